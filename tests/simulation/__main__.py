"""``python -m tests.simulation``: worlds by hand, as many as are wanted."""

from __future__ import annotations

import argparse
import math
import sys
import time


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--runs", type=int, default=None, help="how many worlds to play")
    parser.add_argument("--seconds", type=float, default=None, help="for how long to play (default 10)")
    parser.add_argument("--first", type=int, default=None, help="the first seed (default: a fresh one)")
    parser.add_argument("--seed", type=int, default=None, help="play one world again, and tell all of it")
    options = parser.parse_args()

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
        part = runner.play(
            first + whole.runs, runs=min(runs - whole.runs, 1000), seconds=end - time.monotonic()
        )
        whole.runs += part.runs
        whole.steps += part.steps
        whole.seconds += part.seconds
        if part.failed is not None:
            print(runner.tell(part))
            print(f"after {whole}")
            return 1
        if time.monotonic() - shown >= 5:
            shown = time.monotonic()
            print(f"{whole} (at seed {first + whole.runs})", flush=True)
    print(f"{whole}: every promise was kept")
    return 0


if __name__ == "__main__":
    sys.exit(main())
