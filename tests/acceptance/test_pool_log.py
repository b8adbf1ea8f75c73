"""What a developer sees: lines that say what becomes of each job, coloured on a terminal alone."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import threading

import pytest

from django_gearman.exceptions import JobFailed
from tests import harness
from tests.app import jobs

from .conftest import SITE

Server = harness.GearmanServerProcess

pytestmark = [pytest.mark.acceptance, pytest.mark.django_db(transaction=True)]


class Terminal:
    """A worker whose log goes to a terminal."""

    def __init__(self, server: Server, env: dict[str, str]) -> None:
        ours, theirs = pty.openpty()
        self._end = ours
        self._read = b""
        self.process = subprocess.Popen(
            [*harness.MANAGE, "gearman_worker", "--processes", "1", "--servers", server.address],
            cwd=harness.ROOT,
            env={**harness.environment(), **SITE, "TERM": "xterm", **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=theirs,
        )
        os.close(theirs)
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        while True:
            try:
                self._read += os.read(self._end, 4096)
            except OSError:  # nobody is at the other end any more
                return

    @property
    def text(self) -> str:
        return self._read.decode()

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(20)
        self._thread.join(30)
        os.close(self._end)


def run_two_jobs() -> None:
    assert jobs.add.enqueue(1).get(timeout=20) == 2
    with pytest.raises(JobFailed):
        jobs.fail.enqueue("the photo is broken").get(timeout=20)


def test_lines_of_jobs(site_server: Server):
    with harness.worker(site_server, processes=1, env=SITE) as worker:
        run_two_jobs()
        harness.wait_until(lambda: "the photo is broken" in worker.stderr)
        lines = [line.partition("] ")[2] for line in worker.stderr.splitlines()]
        told = [re.sub(r"H:\S+", "HANDLE", line) for line in lines if "Job " in line]
        assert told[0] == "Job HANDLE (tests.app.jobs.add) started"
        assert re.fullmatch(r"Job HANDLE \(tests\.app\.jobs\.add\) succeeded in \d\.\d\d s", told[1])
        assert told[2] == "Job HANDLE (tests.app.jobs.fail) started"
        assert re.fullmatch(
            r"Job HANDLE \(tests\.app\.jobs\.fail\) failed after \d\.\d\d s: ValueError: the photo is broken",
            told[3],
        )
        assert "\x1b" not in worker.stderr


@pytest.mark.parametrize("env", [{}, {"NO_COLOR": "1"}], ids=["coloured", "plain"])
def test_colours(site_server: Server, env: dict[str, str]):
    terminal = Terminal(site_server, env)
    try:
        run_two_jobs()
        harness.wait_until(lambda: "the photo is broken" in terminal.text)
    finally:
        terminal.stop()
    if env:
        assert "\x1b" not in terminal.text
    else:
        assert re.search(r"\x1b\[32m.* succeeded in \d\.\d\d s\x1b\[0m", terminal.text)
        assert re.search(r"\x1b\[31m.* failed after .*: the photo is broken\x1b\[0m", terminal.text)
