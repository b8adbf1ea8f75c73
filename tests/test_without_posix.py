"""On Windows, as far as that can be told elsewhere: without what Windows has not."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests import harness

ROOT = Path(__file__).resolve().parents[1]

HIDE = """
import asyncio, concurrent.futures.process, ctypes, importlib, logging.handlers, multiprocessing.pool, os
import select, signal, socket, ssl, subprocess, sys, tempfile, time, unittest.mock, urllib.request, uuid
# What looks at the platform when it is loaded is not what is tested.
import django.contrib.admin, django.core.files.locks, django.core.management, django.test
import django.utils.autoreload
from django.db import connection
assert connection.vendor

MODULES = {"fcntl", "grp", "pwd", "resource", "syslog", "termios"}

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name in MODULES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
for name in MODULES:
    sys.modules.pop(name, None)
for module, names in {
    os: "fork geteuid getuid initgroups killpg memfd_create posix_spawn pread pwrite register_at_fork setsid "
    "sysconf O_CLOEXEC O_NOFOLLOW WNOHANG WUNTRACED",
    select: "epoll poll POLLIN POLLOUT POLLHUP POLLERR POLLNVAL POLLRDHUP",
    signal: "SIGALRM SIGCHLD SIGCONT SIGHUP SIGKILL SIGPIPE SIGQUIT SIGSTOP SIGUSR1 SIGUSR2 "
    "ITIMER_REAL pthread_sigmask setitimer siginterrupt sigwait SIG_BLOCK SIG_SETMASK SIG_UNBLOCK",
    socket: "SOCK_CLOEXEC TCP_USER_TIMEOUT",
    time: "CLOCK_MONOTONIC clock_gettime clock_gettime_ns tzset",
}.items():
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)
sys.platform = "win32"
django.setup()
from django.core.management import call_command, execute_from_command_line
"""


def run(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, on something like Windows."""
    return subprocess.run(
        [sys.executable, "-c", HIDE + textwrap.dedent(code)],
        cwd=ROOT,
        env=harness.environment() | env,
        capture_output=True,
        text=True,
        timeout=harness.START_LIMIT,
        check=False,
    )


@pytest.mark.django_db(transaction=True)
class TestWindows:
    def test_what_is_imported(self) -> None:
        package = ROOT / "django_gearman"
        names = sorted(
            ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            for path in package.rglob("*.py")
            # The processes of a worker; it is not imported where there is no fork.
            if path != package / "worker" / "supervisor.py"
        )
        assert "django_gearman.admin.job_record" in names
        done = run(
            f"""
            for name in {names!r}:
                importlib.import_module(name)
            call_command("check")
            """
        )
        assert done.returncode == 0, done.stderr

    @pytest.mark.parametrize(
        ("command", "sentence"),
        [
            ("gearman_server", "gearman_server needs Linux or another POSIX system"),
            ("gearman_worker --pool prefork", "This platform cannot fork processes; use --pool solo."),
        ],
    )
    def test_what_cannot_work_says_so(self, command: str, sentence: str) -> None:
        done = run(f"execute_from_command_line(['manage.py', *{command.split()!r}])")
        assert done.returncode == 1
        assert done.stderr.startswith(f"CommandError: {sentence}")

    def test_a_job_goes_round(self) -> None:
        """Client, `enqueue` and a worker; the server is elsewhere."""
        with harness.server() as server:
            done = run(
                """
                from tests.app.jobs import shout
                result = shout.enqueue(b"hello")
                execute_from_command_line(["manage.py", "gearman_worker", "shout", "--max-jobs", "1"])
                print(result.get(timeout=10))
                call_command("gearman_health")
                """,
                GEARMAN_TEST_SERVER=server.address,
            )
        assert done.returncode == 0, done.stderr
        assert "b'HELLO'" in done.stdout
