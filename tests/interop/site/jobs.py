"""What the foreign workers of ``tests.interop.programs`` do, by our worker."""

import os
import time
from pathlib import Path

from django_gearman import JobContext, job

PREFIX = os.environ.get("INTEROP_PREFIX", "ours.")
"""Functions begin with it, so that one server can have workers of every language."""


@job(name=f"{PREFIX}reverse", raw=True)
def reverse(workload: bytes) -> bytes:
    return workload[::-1]


@job(name=f"{PREFIX}report", raw=True, takes_context=True)
def report(context: JobContext, workload: bytes) -> bytes:
    for step in range(1, 4):
        context.set_progress(step, 3)
        context.flush()
        context.send_data(b"part %d" % step)
    context.warn("almost")
    return b"done"


@job(name=f"{PREFIX}unique", raw=True, takes_context=True)
def unique(context: JobContext, workload: bytes) -> bytes:
    return context.unique.encode()


@job(name=f"{PREFIX}throw", raw=True)
def throw(workload: bytes) -> bytes:
    raise ValueError("no luck")


@job(name=f"{PREFIX}hold", raw=True, takes_context=True)
def hold(context: JobContext, workload: bytes) -> bytes:
    """Say who runs it, and run until somebody makes the file."""
    path = Path(workload.decode())
    with Path(f"{path}.pids").open("a") as pids:
        pids.write(f"{os.getpid()}\n")
    context.set_progress(1, 3)
    while not path.exists():
        time.sleep(0.005)
    return str(os.getpid()).encode()


@job(name=f"{PREFIX}meet", raw=True)
def meet(workload: bytes) -> bytes:
    """Come to a folder, and wait until three are there."""
    folder = Path(workload.decode())
    (folder / str(os.getpid())).touch()
    deadline = time.monotonic() + 60
    while len(list(folder.iterdir())) < 3:
        if time.monotonic() > deadline:
            raise TimeoutError(str(folder))
        time.sleep(0.005)
    return b"met"
