"""Measuring the head with a loss on top: time, memory and accuracy of our passes, of peers and of the bare products."""
