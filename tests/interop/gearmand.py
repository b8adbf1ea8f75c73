"""The C job server as a process, with the questions of ``GearmanServerProcess``."""

from __future__ import annotations

import subprocess

from tests import harness
from tests.acceptance.conftest import program


class Gearmand:
    """gearmand, which keeps nothing, on a free port. Its options go behind ours."""

    def __init__(self, *options: str) -> None:
        self._command = [program("gearmand"), "-L", "127.0.0.1", "-l", "none", *options]
        self.port = harness.free_port()
        self.address = f"127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(
            [*self._command, "-p", str(self.port)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        harness.wait_until(self._answers, what="gearmand")

    def _answers(self) -> bool:
        try:
            return self.ask("version").startswith("OK")
        except OSError:
            return False

    @property
    def pid(self) -> int:
        assert self._process is not None, "it does not run"
        return self._process.pid

    def ask(self, line: str) -> str:
        return harness.ask(self.port, line)

    def status(self) -> dict[str, tuple[int, int, int]]:
        """{function: (waiting and running jobs, running jobs, workers)}."""
        rows = [line.split("\t") for line in self.ask("status").splitlines()]
        return {name: (int(total), int(running), int(workers)) for name, total, running, workers in rows}

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def __enter__(self) -> Gearmand:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()
