"""
Processes: fork them, replace those that die, end those that hang, stop them in good order.

Knows no Gearman. Each child is one call of a function with the read end of a
pipe, its control: a byte there, or its end, means to finish the work in hand
and return. Children pass over the signals that stop the parent, so that TERM to
the whole group and TERM to the parent are the same to them. A child whose parent dies
is killed by the kernel where that can be arranged (Linux), and sees the end of
its control elsewhere. What a child has in hand stands on its row of the board;
what became of that is told to the spokesman.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import json
import logging
import math
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import monotonic, sleep
from types import FrameType
from typing import Any, Final, NamedTuple, Protocol

from ..exceptions import WorkerCannotStart
from .board import Board, Row, RunningJob
from .notify import Notifier

logger = logging.getLogger(__name__)

SHORT_LIFE: Final = 5.0
"""Seconds below which a child's death makes the next start wait."""

FIRST_PAUSE: Final = 0.5
LONGEST_PAUSE: Final = 30.0

TICK: Final = 0.5
"""Seconds between two looks at what the children are at."""

SHRINK_AFTER: Final = 10.0
"""Seconds without a job after which a child of a group that may be smaller is one too many."""

UNSEEN_LIMIT: Final = 5.0
"""Seconds for which a job that was cancelled may be on its way from the server to a process."""

UNSEEN_PAUSE: Final = 0.02
"""Seconds between two looks for it."""

CANCEL_GRACE: Final = 7.0
"""Seconds after which the process is killed that runs a job which was cancelled and does not end."""

ABORT_LIMIT: Final = 1.0
"""Seconds in which a process ends of SIGABRT, before it is killed."""

RELOAD_STEP: Final = 1.0
"""Seconds in which a child of the old code ends before the next is asked to."""

FORK_PAUSE: Final = 1.0
"""Seconds after which a process is started again that the system had no room for."""

TRIAL_LIMIT: Final = 120.0
"""Seconds in which new code shows that it can be loaded."""

FREEZE_LIMIT: Final = 0.5
"""Seconds in which a process stands still when it is told to."""

_STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
_SIGNALS: Final = (*_STOP_SIGNALS, signal.SIGHUP, signal.SIGCHLD)
_PASSED_OVER: Final = (*_STOP_SIGNALS, signal.SIGHUP, signal.SIGALRM)
"""What a child does not heed; what it starts does."""


class Spokesman(Protocol):
    """Who tells others what became of the jobs in hand; see ``foreman``."""

    in_hand: Callable[[], list[bytes]]
    """Told by the supervisor: handles of the jobs that are in hand."""

    def descriptors(self) -> list[int]: ...
    def next_moment(self) -> float: ...
    def turn(self) -> list[bytes]: ...
    def lost(self, handle: bytes, reason: str) -> None: ...
    def give_back(self, handle: bytes) -> None: ...
    def leave(self) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Group:
    """Processes of one kind."""

    work: Callable[[int, int, Row], None]
    """What a child does; called with its number, its control's descriptor and its row of the board."""

    minimum: int
    """How many at a time..."""
    maximum: int
    """... and how many while all of them have work."""

    name: str = ""


class End(NamedTuple):
    """How a supervisor ended."""

    killed: int
    """Children that had not finished in time."""
    put_back: int
    """Jobs that they had in hand."""


class _Child:
    """A running child."""

    def __init__(self, slot: int, pid: int, control: int, row: Row, board: Board) -> None:
        self.slot = slot
        self.pid = pid
        self.control: int | None = control
        self.row = row
        self.board = board
        self.started = monotonic()
        self.is_finishing = False
        self.is_superfluous = False
        """Whether nobody is to take its place."""
        self.naps = -1
        """How often it had fallen asleep when it was last looked at."""
        self.verdict: tuple[RunningJob, str] | None = None
        """For which of its jobs it was killed, and why; empty when that needs no word."""

    def finish(self) -> None:
        """Ask it to return after the work in hand."""
        self.is_finishing = True
        if self.control is not None:
            os.close(self.control)
            self.control = None

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


class Supervisor:
    """
    Keeps groups of processes running.

    TERM or INT: every child finishes what it does, for ``grace`` seconds at
    most; a second one, or QUIT: they are killed at once. HUP: another program
    takes this one's place and replaces the children, each after its work.

    Args:
        groups: What to run.
        grace: Seconds that children get to finish.
        places: How many jobs a child may have in hand.
        spokesman: Told of jobs whose process is gone; tells of those that are no more.
        notifier: Told how it goes.
        trial: A command line that ends with status 0 if new code can take over; None if none can.
        trial_environment: Variables for it beside those of this process.
        replace: Takes over, with a text for ``handover``; raises OSError when it cannot.
        handover: What the supervisor left whose place this one takes.
        code_changed: Asked now and then: whether new code is to take over.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        *,
        grace: float = 30.0,
        places: int = 1,
        spokesman: Spokesman | None = None,
        notifier: Notifier | None = None,
        trial: Sequence[str] | None = None,
        trial_environment: Mapping[str, str] | None = None,
        replace: Callable[[str], None] | None = None,
        handover: str = "",
        code_changed: Callable[[], bool] | None = None,
    ) -> None:
        self._groups = groups
        self._group_of = [group for group in groups for _ in range(group.maximum)]
        """By slot: whose it is."""
        self._grace = grace
        self._spokesman = spokesman
        if spokesman is not None:
            spokesman.in_hand = self._handles
        self._notifier = notifier or Notifier({})
        self._trial = None if trial is None else list(trial)
        self._trial_environment = trial_environment or {}
        self._replace = replace
        self._code_changed = code_changed
        self._board = Board(len(self._group_of), places)
        self._children: dict[int, _Child] = {}
        self._start_at: dict[int, float] = {}
        """{slot without a child: when to fill it}"""
        self._pauses: dict[int, float] = {}
        self._kill_at: float | None = None
        """When children that have not finished are killed; None while nothing is to stop."""
        self._cancels: list[tuple[float, _Child, RunningJob]] = []
        """When a process is killed whose job was cancelled, if it runs it still."""
        self._unseen: dict[bytes, float] = {}
        """{handle of a cancelled job that no child has in hand: until when it may be on its way to one}."""
        self._kills: list[tuple[float, _Child]] = []
        """When a process is killed that was told to abort."""
        self._trial_pid: int | None = None
        self._trial_until = math.inf
        self._try_again = False
        """Whether there is newer code than what is being tried."""
        self._old: list[_Child] = []
        """Children of the old code that were not yet asked to finish."""
        self._next_old_at = 0.0
        self._looked_at = 0.0
        self._is_ready = False
        self._failure = ""
        """Why a child could not even begin."""
        self._put_back = 0
        self._signals: list[int] = []
        self._parent = os.getpid()
        first = 0
        for group in groups:
            self._start_at |= dict.fromkeys(range(first, first + group.minimum), 0.0)
            first += group.maximum
        if handover:
            self._inherit(json.loads(handover))

    def run(self, begun: Callable[[], None] = lambda: None) -> End:
        """
        Supervise until a signal says to stop.

        Args:
            begun: Called once signals are heard, before the first child is made.
        Raises:
            WorkerCannotStart: A child ended with an error before it had begun; the others were stopped.
        """
        wake_read, wake_write = os.pipe()
        os.set_blocking(wake_write, False)
        os.set_blocking(wake_read, False)
        before = {number: signal.signal(number, self._record) for number in _SIGNALS}
        former_wake = signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        # Who handed over to us has blocked them, lest one came in between.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        # What is imported by now stays shared between parent and children.
        gc.collect()
        gc.freeze()
        killed = 0
        try:
            begun()
            while True:
                self._handle_signals()
                self._reap()
                if self._kill_at is None:
                    self._fill_slots()
                elif not self._children:
                    break
                elif monotonic() >= self._kill_at:
                    killed += self._kill_children()
                self._look()
                self._wait(wake_read)
        finally:
            self._kill_children()
            self._end_trial()
            if self._spokesman is not None:
                self._spokesman.close()
            self._board.close()
            signal.set_wakeup_fd(former_wake)
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(wake_read)
            os.close(wake_write)
        if self._failure:
            raise WorkerCannotStart(self._failure)
        return End(killed, self._put_back)

    # Waiting.

    def _wait(self, wake: int) -> None:
        poll = select.poll()
        poll.register(wake, select.POLLIN)
        for descriptor in self._spokesman.descriptors() if self._spokesman is not None else ():
            poll.register(descriptor, select.POLLIN)
        poll.poll(math.ceil(self._timeout() * 1000))
        try:
            while os.read(wake, 512):
                pass
        except BlockingIOError:
            pass
        if self._spokesman is not None:
            for handle in self._spokesman.turn():
                if not self._cancel(handle):
                    self._unseen[handle] = monotonic() + UNSEEN_LIMIT

    def _timeout(self) -> float:
        moments = [self._looked_at + TICK, self._notifier.next_moment()]
        moments += self._start_at.values() if self._kill_at is None else [self._kill_at]
        moments += [moment for moment, *_ in self._cancels]
        moments += [moment for moment, _ in self._kills]
        if self._unseen:
            moments.append(monotonic() + UNSEEN_PAUSE)
        if self._spokesman is not None:
            moments.append(self._spokesman.next_moment())
        return max(0.0, min(moments) - monotonic())

    def _record(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(number)

    def _handle_signals(self) -> None:
        while self._signals:
            number = self._signals.pop(0)
            if number == signal.SIGCHLD:
                continue
            if number == signal.SIGHUP:
                self._begin_reload()
            elif number == signal.SIGQUIT or self._kill_at is not None:
                self._kill_at = monotonic()
                logger.warning(
                    "Killing %d processes now; their jobs go back to the queue", len(self._children)
                )
            else:
                self._stop()
                # Who reads this may rely on it that they have been told.
                logger.info(
                    "Stopping: %d processes finish their job, within %g s; once more to stop now",
                    len(self._children),
                    self._grace,
                )

    def _stop(self) -> None:
        self._kill_at = monotonic() + self._grace
        self._notifier.stopping()
        self._end_trial()
        if self._spokesman is not None:
            self._spokesman.leave()
        for child in self._children.values():
            child.finish()

    # Children come and go.

    def _fill_slots(self) -> None:
        now = monotonic()
        for slot in [slot for slot, moment in self._start_at.items() if moment <= now]:
            del self._start_at[slot]
            self._fork(slot)

    def _fork(self, slot: int) -> None:
        row = self._board.row(slot)
        row.clear()
        flush_output()
        control: tuple[int, ...] = ()
        try:
            control = control_read, control_write = os.pipe()
            pid = os.fork()
        except OSError as error:
            # Too many files or processes, or too little memory, for now: the others have jobs in hand.
            for descriptor in control:
                os.close(descriptor)
            logger.error("No process could be started (%s); trying again in %g s", error, FORK_PAUSE)
            self._start_at[slot] = monotonic() + FORK_PAUSE
            return
        if pid == 0:
            os.close(control_write)
            self._be_child(slot, control_read, row)
        os.close(control_read)
        self._children[pid] = _Child(slot, pid, control_write, row, self._board)

    def _be_child(self, slot: int, control: int, row: Row) -> None:
        """Never returns."""
        status = 1
        try:
            _die_with_parent()
            if os.getppid() != self._parent:
                os._exit(1)  # it died between fork and the line above
            signal.set_wakeup_fd(-1)
            for number in _PASSED_OVER:
                # SIG_IGN would be inherited by the programs that jobs start, which nobody could end then.
                signal.signal(number, _pass_over)
                signal.siginterrupt(number, False)
            os.register_at_fork(
                before=_hold_signals, after_in_parent=_release_signals, after_in_child=_hear_signals
            )
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _show_crashes()
            for sibling in self._children.values():
                if sibling.control is not None:
                    os.close(sibling.control)
            if self._spokesman is not None:
                self._spokesman.close()
            self._group_of[slot].work(slot, control, row)
            status = 0
        except BaseException as error:
            logger.exception("Process %d ended with an error", os.getpid())
            row.say_error(f"{type(error).__name__}: {error}")
        finally:
            try:
                flush_output()
            finally:
                # Whatever happens: what comes back from here would act as the parent, and kill the others.
                os._exit(status)

    def _reap(self) -> None:
        while True:
            try:
                # Of anybody: as process 1 of a container it inherits the orphans of its jobs.
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self._trial_pid:
                self._trial_ended(os.waitstatus_to_exitcode(status))
            elif pid in self._children:
                self._ended(self._children.pop(pid), os.waitstatus_to_exitcode(status))

    def _ended(self, child: _Child, code: int) -> None:
        was_finishing = child.is_finishing
        child.finish()
        if child in self._old:
            self._old.remove(child)
        cause = f"killed by {_name_of(-code)}" if code < 0 else f"exit status {code}"
        jobs = child.row.running()
        for job in jobs:
            self._tell(child, job, f"The worker was lost: {cause}")
        if self._kill_at is not None or child.is_superfluous or child.slot >= len(self._group_of):
            return
        pause = 0.0
        if code > 0 and not child.row.ready and child.board is self._board:
            # So would the next: it is better to say so than to try for ever.
            self._failure = child.row.error or f"it ended with exit status {code}"
            logger.error("Process %d could not begin: %s; stopping", child.pid, self._failure)
            self._stop()
            return
        # With a job in hand none ends as it should: a function has called os._exit.
        if code == 0 and not jobs:
            logger.log(
                logging.DEBUG if was_finishing else logging.INFO,
                "Process %d has ended; another takes its place",
                child.pid,
            )
        else:
            if monotonic() - child.started < SHORT_LIFE:
                # The first at once: only who keeps dying waits.
                last = self._pauses.get(child.slot)
                pause = 0.0 if last is None else min(max(last * 2, FIRST_PAUSE), LONGEST_PAUSE)
                self._pauses[child.slot] = pause
            else:
                self._pauses.pop(child.slot, None)
            logger.error(
                "Process %d is gone: %s%s; another starts in %g s", child.pid, cause, _in_hand(jobs), pause
            )
        self._start_at[child.slot] = monotonic() + pause

    def _tell(self, child: _Child, job: RunningJob, cause: str) -> None:
        """What became of a job whose process is gone."""
        if self._spokesman is None or not job.handle:
            return
        if child.verdict is None:
            self._spokesman.lost(job.handle, cause)
        elif child.verdict[0].serial == job.serial and child.verdict[0].place == job.place:
            if child.verdict[1]:
                self._spokesman.lost(job.handle, child.verdict[1])
        else:
            # Another one's fault.
            self._spokesman.give_back(job.handle)

    def _handles(self) -> list[bytes]:
        jobs = [job for child in self._children.values() for job in child.row.running()]
        return [job.handle for job in jobs if job.handle]

    def _kill_children(self) -> int:
        """Kill and reap what is left, and put its jobs back; how many."""
        children = list(self._children.values())
        for child in children:
            child.kill()
        for child in children:
            try:
                os.waitpid(child.pid, 0)
            except ChildProcessError:
                pass  # it was reaped a moment ago
            child.finish()
            for job in child.row.running():
                self._put_back += 1
                if self._spokesman is not None and job.handle:
                    self._spokesman.give_back(job.handle)
        self._children.clear()
        return len(children)

    # What the children are at.

    def _look(self) -> None:
        now = monotonic()
        self._notifier.turn()
        for handle, until in list(self._unseen.items()):
            if self._cancel(handle) or until <= now:
                del self._unseen[handle]
        for moment, child, job in self._cancels[:]:
            if moment <= now:
                self._cancels.remove((moment, child, job))
                self._kill_for(child, job, "")
        for moment, child in self._kills[:]:
            if moment <= now:
                self._kills.remove((moment, child))
                if self._children.get(child.pid) is child:
                    child.kill()
        if now < self._looked_at + TICK:
            return
        self._looked_at = now
        for child in list(self._children.values()):
            for job in child.row.running():
                if job.kill_at <= now:
                    self._kill_for(child, job, f"Time limit of {job.limit:g} s: killed")
        if self._kill_at is not None:
            return
        if (
            not self._is_ready
            and self._children
            and all(child.row.ready for child in self._children.values())
        ):
            self._is_ready = True
            self._notifier.ready()
        self._scale(now)
        if now >= self._trial_until:
            logger.error("The new code does not start within %g s; going on with the old", TRIAL_LIMIT)
            self._end_trial()
            self._go_on_with_old()
        if self._old and now >= self._next_old_at:
            self._next_old_at = now + RELOAD_STEP
            self._old.pop(0).finish()
        if self._code_changed is not None and self._code_changed():
            logger.info("The code has changed")
            self._begin_reload()

    def _scale(self, now: float) -> None:
        """Start one more where all have work, and end one of those that have none."""
        first = 0
        for group in self._groups:
            slots = range(first, first + group.maximum)
            first += group.maximum
            if group.minimum == group.maximum:
                continue
            children = [
                child for child in self._children.values() if child.slot in slots and not child.is_finishing
            ]
            busy, idle = 0, []
            for child in children:
                since, naps = child.row.asleep_since, child.row.naps
                if since is not None and now - since >= SHRINK_AFTER:
                    idle.append(child)
                if since is None and child.row.ready and naps == child.naps:
                    busy += 1
                child.naps = naps
            taken = {child.slot for child in self._children.values()} | set(self._start_at)
            free = [slot for slot in slots if slot not in taken]
            if busy == len(children) and free and not set(slots) & set(self._start_at):
                logger.debug("All %d processes have work: one more", busy)
                self._start_at[free[0]] = now
            elif len(children) > group.minimum and (len(idle) > 1 or len(idle) == len(children)):
                # One that is idle stays while others work: it will be wanted next.
                logger.debug("%d processes have nothing to do: one less", len(idle))
                idle[-1].is_superfluous = True
                idle[-1].finish()

    def _cancel(self, handle: bytes) -> bool:
        """Interrupt a job; whether a child has it in hand. Handles are never used again."""
        found = False
        for child in self._children.values():
            for job in child.row.running():
                if job.handle == handle:
                    child.row.cancel(job)
                    os.kill(child.pid, signal.SIGALRM)
                    self._cancels.append((monotonic() + CANCEL_GRACE, child, job))
                    found = True
        return found

    def _kill_for(self, child: _Child, job: RunningJob, reason: str) -> None:
        """Kill a child if, and only if, it has that job in hand."""
        if self._children.get(child.pid) is not child or child.verdict is not None:
            return
        # It might be done with the job at any moment: it must stand still to be looked at.
        os.kill(child.pid, signal.SIGSTOP)
        if not self._stands_still(child):
            return
        if any(each.serial == job.serial and each.place == job.place for each in child.row.running()):
            child.verdict = job, reason
            # It shows on stderr where it hangs, and ends of that.
            os.kill(child.pid, signal.SIGABRT)
            self._kills.append((monotonic() + ABORT_LIMIT, child))
            logger.error(
                "Process %d is killed: %s, job %s",
                child.pid,
                reason or "its job was cancelled and went on",
                job.handle.decode(errors="replace"),
            )
        os.kill(child.pid, signal.SIGCONT)

    def _stands_still(self, child: _Child) -> bool:
        """Whether the child has stopped, as it was told; False when it has ended."""
        deadline = monotonic() + FREEZE_LIMIT
        while monotonic() < deadline:
            found, status = os.waitpid(child.pid, os.WNOHANG | os.WUNTRACED)
            if found and os.WIFSTOPPED(status):
                return True
            if found:
                self._ended(self._children.pop(child.pid), os.waitstatus_to_exitcode(status))
                return False
            sleep(0.001)
        os.kill(child.pid, signal.SIGCONT)
        return False

    # New code.

    def _begin_reload(self) -> None:
        if self._kill_at is not None:
            return
        if self._trial_pid is not None:
            # What it has read may be older.
            self._try_again = True
            return
        if self._trial is None:
            logger.warning("There is no other code to load")
            return
        logger.info("Loading the code anew")
        self._notifier.reloading()
        flush_output()
        environment = os.environ | self._trial_environment
        try:
            self._trial_pid = os.posix_spawn(self._trial[0], self._trial, environment)
        except OSError as error:
            # Such as an interpreter that is being replaced.
            logger.error("The new code cannot be tried (%s); going on with the old", error)
            self._go_on_with_old()
            return
        self._trial_until = monotonic() + TRIAL_LIMIT

    def _end_trial(self) -> None:
        if self._trial_pid is not None:
            os.kill(self._trial_pid, signal.SIGKILL)
            try:
                os.waitpid(self._trial_pid, 0)
            except ChildProcessError:
                pass  # it was reaped a moment ago
            self._trial_pid = None
        self._trial_until = math.inf

    def _trial_ended(self, code: int) -> None:
        self._trial_pid = None
        self._trial_until = math.inf
        if self._kill_at is not None:
            return
        if code != 0 or self._replace is None:
            logger.error("The new code does not start (status %d, see above); going on with the old", code)
            self._go_on_with_old()
            return
        if self._try_again:
            # Other code than what was tried would take over.
            self._try_again = False
            self._begin_reload()
            return
        logger.info("The new code takes over; %d processes finish their job first", len(self._children))
        # One that comes now is the other's.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            self._replace(self._hand_over())
        except OSError as error:
            logger.error("The new code cannot take over (%s); going on with the old", error)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            self._go_on_with_old()

    def _go_on_with_old(self) -> None:
        self._notifier.ready()
        if self._try_again:
            self._try_again = False
            self._begin_reload()

    def _hand_over(self) -> str:
        """The children, as whoever takes this program's place finds them."""
        children: list[dict[str, Any]] = []
        for child in self._children.values():
            board = child.board
            os.set_inheritable(board.descriptor, True)
            if child.control is not None:
                os.set_inheritable(child.control, True)
            children.append(
                {
                    "slot": child.slot,
                    "pid": child.pid,
                    "control": child.control,
                    "row": child.row.number,
                    "board": [board.rows, board.places, board.descriptor],
                    "superfluous": child.is_superfluous,
                }
            )
        return json.dumps(children)

    def _inherit(self, children: list[dict[str, Any]]) -> None:
        boards: dict[int, Board] = {}
        for told in children:
            rows, places, descriptor = told["board"]
            if descriptor not in boards:
                os.set_inheritable(descriptor, False)
                boards[descriptor] = Board(rows, places, descriptor)
            board = boards[descriptor]
            child = _Child(told["slot"], told["pid"], -1, board.row(told["row"]), board)
            child.control = told["control"]
            child.is_superfluous = told["superfluous"]
            if child.control is None:
                child.is_finishing = True
            else:
                os.set_inheritable(child.control, False)
                self._old.append(child)
            self._children[child.pid] = child
            self._start_at.pop(child.slot, None)


def flush_output() -> None:
    """Let what was printed leave; it is lost where nobody takes it: a pipe that was closed, a full disk."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (AttributeError, OSError, ValueError):
            pass  # None, where the process was started without


def _in_hand(jobs: list[RunningJob]) -> str:
    """What a process was at, for a line of the log; of many jobs the first."""
    if not jobs:
        return ""
    handle, function = (name.decode(errors="replace") for name in (jobs[0].handle, jobs[0].function))
    others = f" and {len(jobs) - 1} more" if len(jobs) > 1 else ""
    return f", in the middle of job {handle} ({function}){others}"


def _name_of(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _pass_over(number: int, frame: FrameType | None) -> None:
    """The parent hears it as well, and tells its children what it means by their controls."""


_held = threading.local()
"""What else was blocked in a thread that forks."""


def _hold_signals() -> None:
    """Before a child's job forks: what comes for the new process waits until that heeds it."""
    _held.mask = signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_OVER)


def _release_signals() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _held.mask)


def _hear_signals() -> None:
    """In a process that a child's job forked: whoever started it may end it."""
    for number in _PASSED_OVER:
        if signal.getsignal(number) is _pass_over:
            signal.signal(number, signal.SIG_DFL)
    _release_signals()


def _show_crashes() -> None:
    """Have a process that dies of its own fault, or is told to abort, show on stderr where it was."""
    try:
        faulthandler.enable()
    except (RuntimeError, ValueError, OSError):
        pass  # there is no stderr to show it on


def _die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, even while it computes. Linux only."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
