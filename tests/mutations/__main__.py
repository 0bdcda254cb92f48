"""``python -m tests.mutations [name ...]``: break the package line by line and name the test that notices.

Names, or parts of them, choose some of the mutations; ``--check`` only looks whether every quoted line is still there;
``--markdown`` prints the table of mutations and the tests that catch them.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

from tests.mutations.catalogue import MUTATIONS
from tests.mutations.mutation import LineGone
from tests.mutations.runner import ROOT, Verdict, run_all


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument("names", nargs="*", help="mutations, or parts of their names; default: all")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 4), help="how many at a time")
    parser.add_argument("--check", action="store_true", help="only look whether every quoted line is there")
    parser.add_argument("--markdown", action="store_true", help="print a table for a note")
    arguments = parser.parse_args()
    chosen = [m for m in MUTATIONS if not arguments.names or any(name in m.name for name in arguments.names)]
    if not chosen:
        parser.error(f"no mutation is called {' or '.join(arguments.names)}")
    if arguments.check:
        gone = []
        for mutation in chosen:
            try:
                mutation.apply(ROOT)
            except LineGone as error:
                gone.append(str(error))
        print("\n".join(gone) or f"all {len(chosen)} lines are there")
        sys.exit(bool(gone))
    started = time.perf_counter()
    verdicts = run_all(chosen, jobs=arguments.jobs, say=_say)
    if arguments.markdown:
        print("| mutation | file | caught by |\n|---|---|---|")
        for verdict in sorted(verdicts, key=lambda one: (one.mutation.file, one.mutation.name)):
            print(f"| {verdict.mutation.name} | {verdict.mutation.file} | {verdict.by or verdict.status} |")
    missed = [verdict for verdict in verdicts if verdict.status != "caught"]
    print(f"{len(verdicts) - len(missed)} of {len(verdicts)} caught in {time.perf_counter() - started:.0f} s")
    sys.exit(bool(missed))


def _say(verdict: Verdict) -> None:
    what = f"caught by {verdict.by}" if verdict.status == "caught" else f"{verdict.status.upper()} {verdict.by}"
    print(f"{verdict.seconds:5.1f} s  {verdict.mutation.name:<40} {what}", flush=True)


if __name__ == "__main__":
    main()
