"""
The board: memory in which processes show their parent what they are at.

A row for each process, and in it a place for each job that it may have in hand
at a time. The child writes, without a system call; the parent reads when it
must know: when a child has died, when a job's time is up. It writes one thing,
that a job was cancelled. No pointers and no locks: a child may be killed
between any two of its bytes.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from struct import Struct
from time import monotonic
from typing import Final, NamedTuple

_HEADER: Final = 512
_PLACE: Final = 256
_READY, _ASLEEP, _SINCE, _NAPS, _ERROR_SIZE, _ERROR = 0, 1, 8, 16, 24, 26
_MAX_ERROR: Final = _HEADER - _ERROR

_number: Final = Struct("<Q")
_moment: Final = Struct("<d")
_size: Final = Struct("<H")
_job: Final = Struct("<dddHH80s128s")
"""When it is killed, its limit, when it began; the sizes of handle and function, and these."""

_SERIAL, _CANCELLED, _JOB = 0, 8, 16
_MAX_HANDLE: Final = 80
_MAX_FUNCTION: Final = 128


class RunningJob(NamedTuple):
    """A job that a process has in hand, as its board shows it."""

    place: int
    serial: int
    """Tells it from those that were at the place before, and come after."""

    handle: bytes
    """Empty where it was too long to be written down."""

    function: bytes
    started: float
    limit: float
    """Seconds that it may take; 0 for no limit."""

    kill_at: float
    """The monotonic time at which its process is killed; infinite for never."""


class Board:
    """
    Rows for processes; shared with those that are forked later.

    Args:
        rows: How many.
        places: How many jobs each may have in hand at a time.
        descriptor: Of another process's board with such numbers, inherited; None to make one.
    """

    def __init__(self, rows: int, places: int, descriptor: int | None = None) -> None:
        self.rows = rows
        self.places = places
        size = rows * (_HEADER + places * _PLACE)
        if descriptor is None:
            descriptor = _shared_memory()
            os.ftruncate(descriptor, size)
        self.descriptor = descriptor
        self._memory = mmap.mmap(descriptor, size)

    def row(self, number: int) -> Row:
        return Row(self._memory, number, self.places)

    def close(self) -> None:
        self._memory.close()
        os.close(self.descriptor)


def _shared_memory() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("gearman-worker")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


class Row:
    """What one process shows."""

    def __init__(self, memory: mmap.mmap, number: int, places: int) -> None:
        self.number = number
        self._memory = memory
        self._offset = number * (_HEADER + places * _PLACE)
        self._places = places

    def clear(self) -> None:
        """Make room for another process."""
        size = _HEADER + self._places * _PLACE
        self._memory[self._offset : self._offset + size] = bytes(size)

    def place(self, number: int) -> Place:
        return Place(self._memory, self._offset + _HEADER + number * _PLACE)

    # By the process.

    def say_ready(self) -> None:
        """It has begun to work: from now on its death is an accident."""
        self._memory[self._offset + _READY] = 1

    def say_error(self, error: str) -> None:
        """Why it ends."""
        text = error.encode(errors="replace")[:_MAX_ERROR]
        _size.pack_into(self._memory, self._offset + _ERROR_SIZE, len(text))
        self._memory[self._offset + _ERROR : self._offset + _ERROR + len(text)] = text

    def fall_asleep(self) -> None:
        """There is nothing to do."""
        if not self._memory[self._offset + _ASLEEP]:
            naps = _number.unpack_from(self._memory, self._offset + _NAPS)[0]
            _number.pack_into(self._memory, self._offset + _NAPS, naps + 1)
            _moment.pack_into(self._memory, self._offset + _SINCE, monotonic())
            self._memory[self._offset + _ASLEEP] = 1

    def wake_up(self) -> None:
        """There is."""
        self._memory[self._offset + _ASLEEP] = 0

    # By its parent.

    @property
    def ready(self) -> bool:
        return self._memory[self._offset + _READY] == 1

    @property
    def error(self) -> str:
        size = _size.unpack_from(self._memory, self._offset + _ERROR_SIZE)[0]
        start = self._offset + _ERROR
        return self._memory[start : start + size].decode(errors="replace")

    @property
    def asleep_since(self) -> float | None:
        """The monotonic time since which it has had nothing to do; None while it has."""
        if not self._memory[self._offset + _ASLEEP]:
            return None
        return float(_moment.unpack_from(self._memory, self._offset + _SINCE)[0])

    @property
    def naps(self) -> int:
        """How often it has fallen asleep."""
        return int(_number.unpack_from(self._memory, self._offset + _NAPS)[0])

    def running(self) -> list[RunningJob]:
        """The jobs in hand."""
        found = []
        for number in range(self._places):
            start = self._offset + _HEADER + number * _PLACE
            serial = _number.unpack_from(self._memory, start + _SERIAL)[0]
            if serial:
                kill_at, limit, started, handle_size, function_size, handle, function = _job.unpack_from(
                    self._memory, start + _JOB
                )
                found.append(
                    RunningJob(
                        number,
                        serial,
                        handle[:handle_size],
                        function[:function_size],
                        started,
                        limit,
                        kill_at,
                    )
                )
        return found

    def cancel(self, job: RunningJob) -> None:
        """Say that a job is no more; nothing happens if it has ended meanwhile."""
        start = self._offset + _HEADER + job.place * _PLACE
        _number.pack_into(self._memory, start + _CANCELLED, job.serial)


class Place:
    """Where a process says which job it has in hand."""

    def __init__(self, memory: mmap.mmap, offset: int) -> None:
        self._memory = memory
        self._offset = offset
        self._serial = 0

    def begin(self, handle: bytes, function: bytes, started: float, limit: float, kill_at: float) -> None:
        if len(handle) > _MAX_HANDLE:
            handle = b""
        function = function[:_MAX_FUNCTION]
        _job.pack_into(
            self._memory,
            self._offset + _JOB,
            kill_at,
            limit,
            started,
            len(handle),
            len(function),
            handle,
            function,
        )
        self._serial += 1
        # Last of all: whoever sees it sees the rest.
        _number.pack_into(self._memory, self._offset + _SERIAL, self._serial)

    def spare(self) -> None:
        """The function has ended: its time is not up any more."""
        _moment.pack_into(self._memory, self._offset + _JOB, math.inf)

    def end(self) -> None:
        """The server was told."""
        _number.pack_into(self._memory, self._offset + _SERIAL, 0)

    @property
    def cancelled(self) -> bool:
        """Whether the job in hand was cancelled."""
        told: int = _number.unpack_from(self._memory, self._offset + _CANCELLED)[0]
        return told == self._serial != 0
