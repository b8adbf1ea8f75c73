"""Jobs with limits, which say when they run."""

from __future__ import annotations

import os
import time

from django_gearman import job


def _occupy(path: str, name: str, seconds: float) -> None:
    """Write down when it begins and ends; of no seconds, when there is a file beside."""
    for what in ("begin", "end"):
        with open(path, "a") as file:
            file.write(f"{what} {name} {os.getpid()} {time.time():.6f}\n")
        if what == "begin":
            time.sleep(seconds)
            while not seconds and not os.path.exists(f"{path}.go"):
                time.sleep(0.01)


@job(concurrency=2)
def two_at_once(path: str, name: str, seconds: float) -> None:
    _occupy(path, name, seconds)


@job(concurrency=1, limit_key="account")
def one_for_each(path: str, name: str, account: str) -> None:
    _occupy(path, name, 0.01)


@job(rate_limit="50/s")
def fifty_a_second(number: int) -> None:
    pass
