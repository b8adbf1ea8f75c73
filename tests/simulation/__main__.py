"""``python -m tests.simulation``: worlds by hand, as many as are wanted."""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import time

from . import defects

PART = 1_000
"""Worlds between two looks at the clock."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--runs", type=int, help="how many worlds to play")
    parser.add_argument("--seconds", type=float, help="for how long to play; 10 s where nothing is said")
    parser.add_argument("--first", type=int, help="the first seed; a fresh one where none is given")
    parser.add_argument("--seed", type=int, help="play one world again, and tell all of it")
    parser.add_argument("--defects", action="store_true", help="try whether every defect is found")
    parser.add_argument("--defect", metavar="NAME", help="break the code so before anything is played")
    options = parser.parse_args()
    if options.defects:
        return try_defects(options.seconds or 60.0, options.first or 0)
    if options.defect:
        try:
            defects.apply(options.defect)
        except defects.CannotApply as error:
            parser.error(str(error))
    # Not before, or the defect would come too late.
    from . import runner

    if options.seed is not None:
        print(runner.trace(options.seed))
        return 0
    if options.runs is None and options.seconds is None:
        options.seconds = 10.0
    first = runner.fresh_seed() if options.first is None else options.first
    runs = math.inf if options.runs is None else options.runs
    end = math.inf if options.seconds is None else time.monotonic() + options.seconds
    whole = runner.Report()
    shown = time.monotonic()
    while whole.runs < runs and time.monotonic() < end:
        left = min(runs - whole.runs, PART)
        part = runner.play(first + whole.runs, runs=left, seconds=end - time.monotonic())
        whole.add(part)
        if part.failed is not None:
            if not options.defect:
                print(runner.tell(part))
            print(f"found after {whole}: {part.why}")
            return 1
        if time.monotonic() - shown >= 5:
            shown = time.monotonic()
            print(f"{whole} (at seed {first + whole.runs})", flush=True)
    print(f"{whole}: every promise was kept")
    return 0


def try_defects(seconds: float, first: int) -> int:
    """Look for each defect in a process of its own; a table, and whether all were found."""
    missed = 0
    for defect in defects.DEFECTS:
        told = find(defect.name, seconds, first)
        missed += not told.startswith("found")
        print(f"{defect.name:52} {told}", flush=True)
    print(f"{len(defects.DEFECTS) - missed} of {len(defects.DEFECTS)} found")
    return 1 if missed else 0


def find(name: str, seconds: float, first: int = 0) -> str:
    """The last line that is said when worlds are played with a defect."""
    command = [sys.executable, "-m", "tests.simulation", "--defect", name]
    command += ["--seconds", str(seconds), "--first", str(first)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout or done.stderr).strip().splitlines()[-1]


if __name__ == "__main__":
    sys.exit(main())
