"""``python -m toolkit.bench.memory <task>``: the peak of one variant, measured in a process of its own."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path


def main() -> None:
    """Read a pickled task, print bytes."""
    # The parent wrote this file a moment ago; nothing else is ever unpickled.
    config, loss_cfg, plugins, name = pickle.loads(Path(sys.argv[1]).read_bytes())
    from toolkit.bench.measure import peak_of_call
    from toolkit.compose.plugins import load_plugins

    load_plugins(plugins)
    print(peak_of_call(config, loss_cfg, name))


if __name__ == "__main__":
    main()
