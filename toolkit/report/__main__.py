"""``toolkit-report <run>...``: one page of HTML about a run, or about several beside each other."""

from __future__ import annotations

from toolkit.report.command import main

if __name__ == "__main__":
    main()
