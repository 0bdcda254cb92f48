"""``python -m toolkit.bench.memory <task>``: the peak of one variant, measured in a new process."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path


def main() -> None:
    """Read a pickled task and print the bytes."""
    # The parent process wrote this file; nothing else is ever unpickled.
    config, loss_cfg, plugins, name = pickle.loads(Path(sys.argv[1]).read_bytes())
    from toolkit.bench.measure import peak_of_call
    from toolkit.compose.plugins import load_plugins

    load_plugins(plugins)
    print(peak_of_call(config, loss_cfg, name))


if __name__ == "__main__":
    main()
