"""
A program with nothing but a ``Supervisor``, for tests of processes and signals.

    python -m tests.worker.supervised WORK FOLDER PROCESSES GRACE

Children leave a file ``SLOT.PID`` in the folder as they begin and ``SLOT.PID.done`` as
they end; ``WORK`` is a function of this file.
"""

import logging
import os
import select
import signal
import sys
import time
from functools import partial
from pathlib import Path

from django_gearman.worker import supervisor


def idle(folder: Path, control: int) -> None:
    """Until told to stop."""
    select.select([control], [], [])


def busy(folder: Path, control: int) -> None:
    """A job in hand: until told to stop, and then until the file ``go on`` is there."""
    select.select([control], [], [])
    while not (folder / "go on").exists():
        time.sleep(0.01)


def compute(folder: Path, control: int) -> None:
    """A job that looks at nothing."""
    while True:
        sum(range(10_000))


def crash(folder: Path, control: int) -> None:
    raise RuntimeError("it cannot begin")


def ends(folder: Path, control: int) -> None:
    """Ends by itself, without an error."""


def masks(folder: Path, control: int) -> None:
    """Say which signals a child ignores."""
    ignored = [number.name for number in signal.Signals if signal.getsignal(number) == signal.SIG_IGN]
    (folder / "ignored").write_text(" ".join(sorted(ignored)))
    idle(folder, control)


def work(name: str, folder: Path, slot: int, control: int) -> None:
    trace = folder / f"{slot}.{os.getpid()}"
    trace.touch()
    globals()[name](folder, control)
    trace.with_suffix(f".{os.getpid()}.done").touch()


def main() -> None:
    name, folder, processes, grace = sys.argv[1:]
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    supervisor.FIRST_PAUSE = 0.05
    killed = supervisor.Supervisor(
        partial(work, name, Path(folder)), int(processes), grace=float(grace)
    ).run()
    print(f"killed {killed}", flush=True)


if __name__ == "__main__":
    main()
