"""
A program with nothing but a ``Supervisor``, for tests of processes and signals.

    python -m tests.worker.supervised WORK FOLDER PROCESSES[..MOST] GRACE

In the folder, ``trial`` is the program that tries new code, ``changed`` says that there is some,
and while ``no room`` or ``no files`` is there no process can be started. Children leave a file
``SLOT.PID`` in the folder as they begin and ``SLOT.PID.done`` as they end; ``WORK`` is a function
of this file.
"""

import errno
import logging
import math
import os
import select
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from time import monotonic

from django_gearman.worker import supervisor
from django_gearman.worker.board import Row
from django_gearman.worker.notify import Notifier


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


def moves_on(folder: Path, control: int, row: Row) -> None:
    """Have a first job in hand until the file ``next`` is there, and then a second; heed no signal."""
    row.say_ready()
    place = row.place(0)
    place.begin(b"first", b"f", monotonic(), 0.0, math.inf)
    (folder / "running").touch()
    while not (folder / "next").exists():
        time.sleep(0.005)
    place.end()
    place.begin(b"second", b"f", monotonic(), 0.0, math.inf)
    busy(folder, control, row)
    place.end()


def begins_late(folder: Path, control: int, row: Row) -> None:
    """Have a job in hand once the file ``next`` is there, and go on with it; heed no signal."""
    row.say_ready()
    (folder / "running").touch()
    while not (folder / "next").exists():
        time.sleep(0.005)
    row.place(0).begin(b"first", b"f", monotonic(), 0.0, math.inf)
    busy(folder, control, row)


class Canceller:
    """Says that the first job was cancelled, once the file ``cancel`` is there; writes what it is told."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._has_said = False

    def descriptors(self) -> list[int]:
        return []

    def next_moment(self) -> float:
        return monotonic() + 0.02

    def turn(self) -> list[bytes]:
        if self._has_said or not (self._folder / "cancel").exists():
            return []
        self._has_said = True
        print("first was cancelled", flush=True)
        return [b"first"]

    def lost(self, handle: bytes, reason: str) -> None:
        print(f"lost {handle.decode()}: {reason}", flush=True)

    def give_back(self, handle: bytes) -> None:
        print(f"gave back {handle.decode()}", flush=True)

    def leave(self) -> None:
        print("leaving", flush=True)

    def close(self) -> None:
        pass


class Loud(Notifier):
    """Says what a service manager is told."""

    def ready(self) -> None:
        print("told that it is ready", flush=True)

    def reloading(self) -> None:
        print("told that it loads", flush=True)


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


def vanishes(folder: Path, control: int, row: Row) -> None:
    """Two jobs in hand, and one of them ends the process."""
    row.say_ready()
    for number, handle in enumerate((b"first", b"second")):
        row.place(number).begin(handle, b"f", monotonic(), 0.0, math.inf)
    os._exit(0)


def starts_others(folder: Path, control: int, row: Row) -> None:
    """Start a program and fork a process for each signal, and send it at once; say of what they ended."""
    ended = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGALRM):
        with subprocess.Popen(["sleep", "600"]) as program:
            program.send_signal(number)
        ended.append(program.returncode)
        forked = os.fork()
        if forked == 0:
            time.sleep(600)
            os._exit(0)
        os.kill(forked, number)
        ended.append(os.waitstatus_to_exitcode(os.waitpid(forked, 0)[1]))
    (folder / "ended").write_text(" ".join(signal.Signals(-status).name for status in ended))
    idle(folder, control, row)


def prints_to_nobody(folder: Path, control: int, row: Row) -> None:
    """The second prints into a pipe that nobody reads any more, and ends once the file ``next`` is there."""
    if row.number == 0 or (folder / "next").exists():
        return idle(folder, control, row)
    row.say_ready()
    reading, writing = os.pipe()
    os.close(reading)
    sys.stdout = open(writing, "w")  # noqa: SIM115  # it cannot be closed
    print("Is anybody there?")
    while not (folder / "next").exists():
        time.sleep(0.005)


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
    supervisor.CANCEL_GRACE = 0.3
    supervisor.FORK_PAUSE = 0.05
    supervisor.TICK = 0.02
    changed, no_room, fork = Path(folder, "changed"), Path(folder, "no room"), os.fork
    no_files, pipe = Path(folder, "no files"), os.pipe

    def has_changed() -> bool:
        if not changed.exists():
            return False
        changed.unlink()
        return True

    def fork_if_there_is_room() -> int:
        if no_room.exists():
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return fork()

    def pipe_if_there_are_files() -> tuple[int, int]:
        if no_files.exists():
            raise OSError(errno.ENFILE, os.strerror(errno.ENFILE))
        return pipe()

    def replace(children: str) -> None:
        raise OSError("it is only shown")

    os.fork = fork_if_there_is_room
    os.pipe = pipe_if_there_are_files
    end = supervisor.Supervisor(
        [group],
        places=2,
        grace=float(grace),
        spokesman=Canceller(Path(folder)),
        notifier=Loud({}),
        trial=[f"{folder}/trial"],
        replace=replace,
        code_changed=has_changed,
    ).run()
    print(f"killed {end.killed}", flush=True)


if __name__ == "__main__":
    main()
