"""
A program with nothing but a ``Supervisor``, for tests of processes and signals.

    python -m tests.worker.supervised WORK FOLDER PROCESSES[..MOST] GRACE

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
from django_gearman.worker.board import Row


def idle(folder: Path, control: int, row: Row) -> None:
    """Until told to stop."""
    row.say_ready()
    row.fall_asleep()
    select.select([control], [], [])


def busy(folder: Path, control: int, row: Row) -> None:
    """A job in hand: until told to stop, and then until the file ``go on`` is there."""
    row.say_ready()
    select.select([control], [], [])
    while not (folder / "go on").exists():
        time.sleep(0.01)


def until_told(folder: Path, control: int, row: Row) -> None:
    """Work until the file ``SLOT.sleep`` is there, and sleep then."""
    row.say_ready()
    while not select.select([control], [], [], 0.01)[0]:
        if (folder / f"{row.number}.sleep").exists():
            row.fall_asleep()


def compute(folder: Path, control: int, row: Row) -> None:
    """A job that looks at nothing."""
    row.say_ready()
    while True:
        sum(range(10_000))


def crash(folder: Path, control: int, row: Row) -> None:
    row.say_ready()
    raise RuntimeError("it went wrong")


def cannot_begin(folder: Path, control: int, row: Row) -> None:
    if row.number == 0:
        # The first child is all right.
        return idle(folder, control, row)
    raise RuntimeError("there is no spoon")


def ends(folder: Path, control: int, row: Row) -> None:
    """Ends by itself, without an error."""


def masks(folder: Path, control: int, row: Row) -> None:
    """Say which signals a child ignores."""
    ignored = [number.name for number in signal.Signals if signal.getsignal(number) == signal.SIG_IGN]
    (folder / "ignored").write_text(" ".join(sorted(ignored)))
    idle(folder, control, row)


def work(name: str, folder: Path, slot: int, control: int, row: Row) -> None:
    trace = folder / f"{slot}.{os.getpid()}"
    trace.touch()
    globals()[name](folder, control, row)
    trace.with_suffix(f".{os.getpid()}.done").touch()


def main() -> None:
    name, folder, processes, grace = sys.argv[1:]
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    supervisor.FIRST_PAUSE = 0.05
    supervisor.SHRINK_AFTER = 0.5
    low, _, high = processes.partition("..")
    group = supervisor.Group(partial(work, name, Path(folder)), int(low), int(high or low))
    end = supervisor.Supervisor([group], grace=float(grace)).run()
    print(f"killed {end.killed}", flush=True)


if __name__ == "__main__":
    main()
