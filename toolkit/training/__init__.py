"""The loop around the losses: experience, optimizer steps, evaluation, checkpoints, progress and report."""
