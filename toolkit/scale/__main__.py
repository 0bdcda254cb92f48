"""``python -m toolkit.scale``: print what a step communicates and the memory of the head, for any number of ranks."""

from __future__ import annotations

import argparse

from toolkit.errors import stopping_on_error


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m toolkit.scale", description=__doc__)
    parser.add_argument("--ranks", type=int, default=1024, help="processes of the step (default: %(default)s)")
    parser.add_argument("--model", choices=["8B", "70B", "1T"], default="8B", help="class of the model")
    parser.add_argument("--micro-batches", type=int, default=8, help="of a rank in one step")
    parser.add_argument("--tokens", type=int, default=16_384, help="scored in one micro-batch")
    parser.add_argument("--sequence-parallel", type=int, help="ranks that share a row (default: 8, or what divides)")
    parser.add_argument(
        "--vocab-parallel", type=int, help="ranks that share the head's vocabulary (default: 8, or what divides)"
    )
    arguments = parser.parse_args()
    from toolkit.scale import table  # loads torch
    from toolkit.scale.head import MODELS

    usual = table.usual_mesh(arguments.ranks)
    meshes = (arguments.sequence_parallel, arguments.vocab_parallel)
    sequence, vocab = (usual if mesh is None else mesh for mesh in meshes)
    model = next(model for model in MODELS if model.name == arguments.model)
    with stopping_on_error():
        setup = table.Setup(arguments.ranks, model, arguments.micro_batches, arguments.tokens, sequence, vocab)
        print(table.step_table(setup))
        print()
        print(table.head_table(arguments.tokens, max(2, vocab), max(2, min(64, arguments.ranks))))


if __name__ == "__main__":
    main()
