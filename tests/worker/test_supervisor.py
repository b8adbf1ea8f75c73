"""``Supervisor``: real processes and real signals."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness import ROOT, is_running, running_processes, wait_until

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")


class Program:
    """``supervised.py``, and what its children left."""

    def __init__(self, work: str, folder: Path, processes: int | str, grace: float) -> None:
        self._folder = folder
        self._log = folder / "log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-W",
                    "error",
                    "-m",
                    "tests.worker.supervised",
                    work,
                    folder,
                    str(processes),
                    str(grace),
                ],
                cwd=ROOT,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def log(self) -> str:
        return self._log.read_text()

    def begun(self) -> list[int]:
        """Process ids of all children that began, in their slots' order."""
        return [
            int(path.suffix[1:])
            for path in sorted(self._folder.glob("[0-9].[0-9]*"))
            if path.suffix != ".done"
        ]

    def done(self) -> list[int]:
        return [int(path.name.split(".")[1]) for path in self._folder.glob("*.done")]

    def children(self) -> list[int]:
        return [process.pid for process in running_processes() if process.parent == self.process.pid]

    def group(self) -> list[int]:
        return [process.pid for process in running_processes() if process.group == self.process.pid]

    def wait_for_children(self, count: int) -> list[int]:
        wait_until(
            lambda: len(set(self.begun()) & set(self.children())) >= count, what=f"children; {self.log}"
        )
        return self.children()

    def signal(self, number: signal.Signals, *, group: bool = False) -> None:
        (os.killpg if group else os.kill)(self.process.pid, number)

    def wait(self, limit: float = 10.0) -> int:
        """Its exit code; nothing of it is left then."""
        code = self.process.wait(limit)
        assert self.group() == []
        return code

    def go_on(self) -> None:
        self.leave("go on")

    def leave(self, name: str) -> None:
        """An empty file, for the program to see."""
        (self._folder / name).touch()

    def take_away(self, name: str) -> None:
        (self._folder / name).unlink()

    def has(self, name: str) -> bool:
        return (self._folder / name).exists()

    def write_trial(self, script: str) -> None:
        """What the program does to try new code; lines of a shell, in the folder."""
        trial = self._folder / "trial"
        trial.write_text(f"#!/bin/sh\ncd {shlex.quote(str(self._folder))}\n{script}\n")
        trial.chmod(0o755)


Start = Callable[..., Program]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    programs: list[Program] = []

    def start(
        work: str, *, processes: int | str = 2, grace: float = 60.0, there: str | None = None
    ) -> Program:
        folder = tmp_path / str(len(programs))
        folder.mkdir()
        if there is not None:
            (folder / there).touch()
        programs.append(Program(work, folder, processes, grace))
        return programs[-1]

    yield start
    for program in programs:
        if program.group():
            os.killpg(program.process.pid, signal.SIGKILL)
        program.process.wait()


class TestStop:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    @pytest.mark.parametrize("group", [False, True], ids=["parent", "group"])
    def test_children_finish_the_job_in_hand(self, start: Start, number: signal.Signals, group: bool) -> None:
        program = start("busy")
        children = program.wait_for_children(2)
        program.signal(number, group=group)
        wait_until(lambda: "finish their job" in program.log)
        assert program.children() == children
        assert program.done() == []
        program.go_on()
        assert program.wait() == 0
        assert sorted(program.done()) == sorted(children)
        assert "killed 0" in program.log

    @pytest.mark.parametrize("group", [False, True], ids=["parent", "group"])
    def test_the_second_time_kills(self, start: Start, group: bool) -> None:
        program = start("busy")
        program.wait_for_children(2)
        program.signal(signal.SIGTERM, group=group)
        wait_until(lambda: "finish their job" in program.log)
        program.signal(signal.SIGTERM, group=group)
        assert program.wait() == 0
        assert program.done() == []
        assert "killed 2" in program.log

    @pytest.mark.parametrize("group", [False, True], ids=["parent", "group"])
    def test_quit_kills(self, start: Start, group: bool) -> None:
        program = start("busy")
        program.wait_for_children(2)
        program.signal(signal.SIGQUIT, group=group)
        assert program.wait() == 0
        assert program.done() == []
        assert "killed 2" in program.log

    def test_grace_ends(self, start: Start) -> None:
        program = start("compute", grace=0.2)
        program.wait_for_children(2)
        program.signal(signal.SIGTERM)
        assert program.wait() == 0
        assert "killed 2" in program.log

    def test_one_that_is_done_is_not_killed(self, start: Start) -> None:
        program = start("idle", processes=4)
        children = program.wait_for_children(4)
        program.signal(signal.SIGTERM)
        assert program.wait() == 0
        assert sorted(program.done()) == sorted(children)
        assert "killed 0" in program.log

    def test_children_that_die_while_stopping_are_not_replaced(self, start: Start) -> None:
        program = start("busy")
        children = program.wait_for_children(2)
        program.signal(signal.SIGTERM)
        wait_until(lambda: "finish their job" in program.log)
        os.kill(children[0], signal.SIGKILL)
        program.go_on()
        assert program.wait() == 0
        assert len(program.begun()) == 2

    def test_what_a_child_starts_hears_signals(self, start: Start, tmp_path: Path) -> None:
        """Though the child itself does not."""
        start("starts_others", processes=1)
        ended = tmp_path / "0" / "ended"
        text = wait_until(lambda: ended.exists() and ended.read_text())
        told = [name for name in ("SIGTERM", "SIGINT", "SIGQUIT", "SIGHUP", "SIGALRM") for _ in range(2)]
        assert str(text).split() == told

    def test_a_child_that_is_stopped_by_a_signal_goes_on(self, start: Start) -> None:
        """TERM to one child alone is not how it is stopped."""
        program = start("idle")
        children = program.wait_for_children(2)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGALRM):
            os.kill(children[0], number)
        program.signal(signal.SIGTERM)
        assert program.wait() == 0
        assert len(program.done()) == 2


class TestReplace:
    def test_a_killed_child(self, start: Start) -> None:
        program = start("idle")
        first, second = program.wait_for_children(2)
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: len(program.begun()) == 3)
        assert second in program.children()
        assert first not in program.children()
        assert f"Process {first} is gone: killed by SIGKILL" in program.log
        program.signal(signal.SIGTERM)
        assert program.wait() == 0

    def test_one_that_ended_by_itself(self, start: Start) -> None:
        program = start("ends", processes=1)
        wait_until(lambda: len(program.done()) >= 2)
        program.signal(signal.SIGTERM)
        assert program.wait() == 0

    def test_one_whose_output_nobody_takes(self, start: Start) -> None:
        program = start("prints_to_nobody")
        first, second = [
            next(pid for pid in program.wait_for_children(2) if program.has(f"{slot}.{pid}"))
            for slot in (0, 1)
        ]
        program.leave("next")
        wait_until(lambda: second not in program.children() and len(program.begun()) == 3, what="another")
        assert first in program.children()
        program.signal(signal.SIGTERM)
        assert program.wait() == 0
        assert "is gone" not in program.log
        assert "Traceback" not in program.log

    def test_one_that_is_gone_with_a_job_in_hand(self, start: Start) -> None:
        program = start("vanishes", processes=1)
        wait_until(lambda: len(program.begun()) >= 3)
        program.signal(signal.SIGTERM)
        assert program.wait() == 0
        assert (
            "is gone: exit status 0, in the middle of job first (f) and 1 more; another starts" in program.log
        )
        assert "takes its place" not in program.log

    def test_the_pause_grows_for_the_short_lived(self, start: Start) -> None:
        program = start("crash", processes=1)
        wait_until(lambda: len(program.begun()) >= 5)
        program.signal(signal.SIGTERM)
        assert program.wait() == 0
        pauses = [
            float(pause) for pause in re.findall(r"exit status 1; another starts in ([\d.]+) s", program.log)
        ]
        assert pauses[:4] == [0, 0.05, 0.1, 0.2]
        assert "it went wrong" in program.log

    def test_one_that_cannot_begin_ends_all(self, start: Start) -> None:
        program = start("cannot_begin")
        assert program.wait() == 1
        assert "WorkerCannotStart" in program.log
        assert "a worker process cannot start: RuntimeError: there is no spoon" in program.log
        # The one that had begun finished.
        assert len(program.done()) == 1

    def test_each_slot_has_its_own_pause(self, start: Start) -> None:
        program = start("idle")
        first, second = program.wait_for_children(2)
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: len(program.begun()) == 3)
        os.kill(second, signal.SIGKILL)
        wait_until(lambda: len(program.begun()) == 4)
        assert re.findall(r"another starts in ([\d.]+) s", program.log) == ["0", "0"]
        program.signal(signal.SIGTERM)
        assert program.wait() == 0

    @pytest.mark.parametrize("lack", ["no room", "no files"])
    def test_when_there_is_room_again(self, start: Start, lack: str) -> None:
        program = start("idle")
        first, second = program.wait_for_children(2)
        program.leave(lack)
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: "No process could be started" in program.log)
        assert program.children() == [second]
        program.take_away(lack)
        program.wait_for_children(2)
        assert second in program.children()

    def test_nobody_is_told_that_it_is_ready_before_there_is_one(self, start: Start) -> None:
        program = start("idle", there="no room")
        wait_until(lambda: program.log.count("No process could be started") > 4)
        assert "told that it is ready" not in program.log
        program.take_away("no room")
        wait_until(lambda: "told that it is ready" in program.log)


class TestNewCode:
    """In place of the program, whoever takes over only says so."""

    def test_that_cannot_even_be_tried(self, start: Start) -> None:
        program = start("idle")
        children = program.wait_for_children(2)
        program.signal(signal.SIGHUP)
        wait_until(lambda: "The new code cannot be tried" in program.log)
        program.write_trial("exit 0")
        program.signal(signal.SIGHUP)
        wait_until(lambda: "The new code takes over" in program.log)
        assert sorted(program.children()) == sorted(children)

    def test_that_is_mended_while_it_is_tried(self, start: Start) -> None:
        program = start("idle")
        program.wait_for_children(2)
        program.write_trial(
            "test -e good; code=$?; touch tried; until [ -e end ]; do sleep 0.01; done; exit $code"
        )
        program.leave("changed")
        wait_until(lambda: program.has("tried"))
        program.leave("good")
        program.leave("changed")
        wait_until(lambda: program.log.count("The code has changed") == 2)
        program.leave("end")
        wait_until(lambda: "The new code takes over" in program.log)
        assert "The new code does not start" in program.log

    def test_that_is_spoiled_while_it_is_tried(self, start: Start) -> None:
        program = start("idle")
        children = program.wait_for_children(2)
        program.write_trial(
            "test ! -e bad; code=$?; touch tried; until [ -e end ]; do sleep 0.01; done; exit $code"
        )
        program.leave("changed")
        wait_until(lambda: program.has("tried"))
        program.leave("bad")
        program.leave("changed")
        wait_until(lambda: program.log.count("The code has changed") == 2)
        program.leave("end")
        wait_until(lambda: "The new code does not start" in program.log)
        assert "The new code takes over" not in program.log
        assert sorted(program.children()) == sorted(children)

    def test_that_cannot_take_over(self, start: Start) -> None:
        program = start("idle")
        program.wait_for_children(2)
        wait_until(lambda: "told that it is ready" in program.log)
        program.write_trial("exit 0")
        program.signal(signal.SIGHUP)
        wait_until(lambda: "The new code cannot take over" in program.log)
        wait_until(lambda: program.log.rfind("that it is ready") > program.log.find("that it loads"))


class TestRange:
    def test_grows_while_all_have_work_and_shrinks(self, start: Start, tmp_path: Path) -> None:
        program = start("until_told", processes="1..3")
        wait_until(lambda: len(program.children()) == 3)
        # Two have nothing to do now: one of them may go, and the other is the next to be wanted.
        for path in sorted((tmp_path / "0").glob("[0-2].[0-9]*"))[:2]:
            path.with_suffix(".sleep").touch()
        wait_until(lambda: len(program.children()) == 2)
        (tmp_path / "0" / "2.sleep").touch()
        wait_until(lambda: len(program.children()) == 1)
        program.signal(signal.SIGTERM)
        assert program.wait() == 0
        assert "killed 0" in program.log

    def test_one_that_dies_is_replaced(self, start: Start) -> None:
        program = start("idle", processes="2..4")
        first, _ = program.wait_for_children(2)
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: len(program.begun()) == 3 and len(program.children()) == 2)


class TestCancel:
    def test_job_that_goes_on(self, start: Start, tmp_path: Path) -> None:
        program = start("moves_on", processes=1)
        (first,) = program.wait_for_children(1)
        wait_until((tmp_path / "0" / "running").exists)
        (tmp_path / "0" / "cancel").touch()
        wait_until(lambda: len(program.begun()) == 2)
        assert first not in program.children()
        assert f"Process {first} is killed: its job was cancelled and went on" in program.log
        # The server knows: it has ended the job itself.
        assert "lost" not in program.log
        assert "gave back" not in program.log

    def test_job_that_was_on_its_way(self, start: Start, tmp_path: Path) -> None:
        """The word that it is cancelled overtakes the job itself."""
        program = start("begins_late", processes=1)
        (first,) = program.wait_for_children(1)
        wait_until((tmp_path / "0" / "running").exists)
        (tmp_path / "0" / "cancel").touch()
        wait_until(lambda: "first was cancelled" in program.log)
        (tmp_path / "0" / "next").touch()
        wait_until(lambda: f"Process {first} is killed: its job was cancelled and went on" in program.log)

    def test_job_that_came_after(self, start: Start, tmp_path: Path) -> None:
        program = start("moves_on", processes=1)
        children = program.wait_for_children(1)
        wait_until((tmp_path / "0" / "running").exists)
        (tmp_path / "0" / "cancel").touch()
        wait_until(lambda: "first was cancelled" in program.log)
        (tmp_path / "0" / "next").touch()
        # Well after the grace time: nothing must happen, so there is nothing to wait for.
        time.sleep(1)
        assert program.children() == children
        program.go_on()
        program.signal(signal.SIGTERM)
        assert program.wait() == 0
        assert "leaving" in program.log
        assert "killed 0" in program.log

    def test_process_that_is_killed_by_somebody_else(self, start: Start, tmp_path: Path) -> None:
        program = start("moves_on", processes=1)
        (first,) = program.wait_for_children(1)
        wait_until((tmp_path / "0" / "running").exists)
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: len(program.begun()) == 2)
        assert "lost first: The worker was lost: killed by SIGKILL" in program.log


class TestOrphans:
    @pytest.mark.parametrize("work", ["idle", "busy", "compute"])
    def test_none_outlives_a_parent_that_was_killed(self, start: Start, work: str) -> None:
        program = start(work, processes=4)
        children = program.wait_for_children(4)
        program.signal(signal.SIGKILL)
        wait_until(lambda: not any(is_running(child) for child in children))
        assert program.wait() == -signal.SIGKILL

    def test_a_child_that_was_replaced_dies_too(self, start: Start) -> None:
        program = start("compute")
        first, _ = program.wait_for_children(2)
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: len(program.begun()) == 3)
        program.signal(signal.SIGKILL)
        wait_until(lambda: not program.group())
