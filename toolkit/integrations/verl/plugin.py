"""The entry point ``verl.plugins``: importing this module registers our losses with verl.

verl imports it while it is imported itself, in every worker, and calls nothing. verl does not show what goes wrong
there, so it is printed.
"""

from __future__ import annotations

import sys

from toolkit.errors import described

try:
    from toolkit.integrations.verl.registration import register

    register()
except Exception as error:
    print(f"toolkit.integrations.verl: no loss of the toolkit is registered: {described(error)}", file=sys.stderr)
    raise
