"""Our policy losses and advantage estimators in verl, as ``toolkit/<name>``; tested with verl 0.9.1.

verl imports this module (entry point ``verl.plugins``) while it is imported itself, in every worker, and calls nothing:
so importing it registers them. verl does not show what goes wrong there, so it is printed.
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
