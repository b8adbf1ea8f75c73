"""
Processes: fork them, replace those that die, stop them in good order.

Knows no Gearman. Each child is one call of a function with the read end of a
pipe, its control: a byte there, or its end, means to finish the work in hand
and return. Children ignore the signals that stop the parent, so that TERM to
the whole group and TERM to the parent are the same. A child whose parent dies
is killed by the kernel where that can be arranged (Linux), and sees the end of
its control elsewhere.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import select
import signal
import sys
from collections.abc import Callable
from time import monotonic
from types import FrameType
from typing import Final

logger = logging.getLogger(__name__)

SHORT_LIFE: Final = 5.0
"""Seconds below which a child's death makes the next start wait."""

FIRST_PAUSE: Final = 0.5
LONGEST_PAUSE: Final = 30.0

_STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)


class _Child:
    """A running child."""

    def __init__(self, slot: int, pid: int, control: int) -> None:
        self.slot = slot
        self.pid = pid
        self.control: int | None = control
        self.started = monotonic()

    def finish(self) -> None:
        """Ask it to return after the work in hand."""
        if self.control is not None:
            os.close(self.control)
            self.control = None

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


class Supervisor:
    """
    Keeps a number of processes running.

    TERM or INT: every child finishes what it does, for ``grace`` seconds at
    most; a second one, or QUIT: they are killed at once.

    Args:
        work: What a child does; called with its number and its control's descriptor.
        processes: How many at a time.
        grace: Seconds that children get to finish.
    """

    def __init__(self, work: Callable[[int, int], None], processes: int, *, grace: float = 30.0) -> None:
        self._work = work
        self._processes = processes
        self._grace = grace
        self._children: dict[int, _Child] = {}
        self._start_at: dict[int, float] = dict.fromkeys(range(processes), 0.0)
        """{slot without a child: when to fill it}"""
        self._pauses: dict[int, float] = {}
        self._kill_at: float | None = None
        """When children that have not finished are killed; None while nothing is to stop."""
        self._signals: list[int] = []
        self._parent = os.getpid()

    def run(self) -> int:
        """Supervise until a signal says to stop; the number of children that had to be killed."""
        wake_read, wake_write = os.pipe()
        os.set_blocking(wake_write, False)
        os.set_blocking(wake_read, False)
        handled = (*_STOP_SIGNALS, signal.SIGCHLD)
        before = {number: signal.signal(number, self._record) for number in handled}
        former_wake = signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        # What is imported by now stays shared between parent and children.
        gc.collect()
        gc.freeze()
        killed = 0
        try:
            while True:
                self._handle_signals()
                self._reap()
                if self._kill_at is None:
                    self._fill_slots()
                elif not self._children:
                    return killed
                elif monotonic() >= self._kill_at:
                    killed += self._kill_children()
                select.select([wake_read], [], [], self._timeout())
                self._drain(wake_read)
        finally:
            self._kill_children()
            signal.set_wakeup_fd(former_wake)
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(wake_read)
            os.close(wake_write)

    def _record(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(number)

    @staticmethod
    def _drain(descriptor: int) -> None:
        try:
            while os.read(descriptor, 512):
                pass
        except BlockingIOError:
            pass

    def _handle_signals(self) -> None:
        while self._signals:
            number = self._signals.pop(0)
            if number == signal.SIGCHLD:
                continue
            if number == signal.SIGQUIT or self._kill_at is not None:
                self._kill_at = monotonic()
                logger.warning(
                    "Killing %d processes now; their jobs go back to the queue", len(self._children)
                )
                continue
            self._kill_at = monotonic() + self._grace
            logger.info(
                "Stopping: %d processes finish their job, within %g s; once more to stop now",
                len(self._children),
                self._grace,
            )
            for child in self._children.values():
                child.finish()

    def _timeout(self) -> float | None:
        deadlines = [*self._start_at.values()] if self._kill_at is None else [self._kill_at]
        return max(0.0, min(deadlines) - monotonic()) if deadlines else None

    def _fill_slots(self) -> None:
        now = monotonic()
        for slot in [slot for slot, moment in self._start_at.items() if moment <= now]:
            del self._start_at[slot]
            self._fork(slot)

    def _fork(self, slot: int) -> None:
        control_read, control_write = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            os.close(control_write)
            self._be_child(slot, control_read)
        os.close(control_read)
        self._children[pid] = _Child(slot, pid, control_write)

    def _be_child(self, slot: int, control: int) -> None:
        """Never returns."""
        status = 1
        try:
            _die_with_parent()
            if os.getppid() != self._parent:
                os._exit(1)  # it died between fork and the line above
            signal.set_wakeup_fd(-1)
            for number in _STOP_SIGNALS:
                signal.signal(number, signal.SIG_IGN)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for sibling in self._children.values():
                if sibling.control is not None:
                    os.close(sibling.control)
            self._work(slot, control)
            status = 0
        except BaseException:
            logger.exception("Process %d ended with an error", os.getpid())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def _reap(self) -> None:
        for pid in list(self._children):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                self._replace(self._children.pop(pid), status)

    def _replace(self, child: _Child, status: int) -> None:
        child.finish()
        if self._kill_at is not None:
            return
        code = os.waitstatus_to_exitcode(status)
        cause = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        lived = monotonic() - child.started
        pause = 0.0
        if lived < SHORT_LIFE:
            pause = min(self._pauses.get(child.slot, FIRST_PAUSE / 2) * 2, LONGEST_PAUSE)
            self._pauses[child.slot] = pause
        else:
            self._pauses.pop(child.slot, None)
        logger.error("Process %d ended with %s; another starts in %g s", child.pid, cause, pause)
        self._start_at[child.slot] = monotonic() + pause

    def _kill_children(self) -> int:
        """Kill and reap what is left; how many."""
        children = list(self._children.values())
        for child in children:
            child.kill()
        for child in children:
            os.waitpid(child.pid, 0)
            child.finish()
        self._children.clear()
        return len(children)


def _die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, even while it computes. Linux only."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
