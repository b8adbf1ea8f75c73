"""
What a server asks of the operating system: the background, a pid file, another user, higher limits.

Knows no Gearman. Every refusal is a ``CommandError`` of one sentence. Of use on POSIX systems only.
"""

from __future__ import annotations

import os
import signal
import stat
import sys
from collections.abc import Iterable
from types import TracebackType
from typing import Final, Self

from django.core.management.base import CommandError

if sys.platform != "win32":
    # `manage.py help` and the like read this there, too.
    import fcntl
    import pwd
    import resource

RESERVED_DESCRIPTORS: Final = 64
"""Descriptors that are no connections: database, log, listening sockets, Python's own files."""


class Background:
    """
    A process of its own session, and the one that it was started from, which waits until it is ready.

    Making one forks: only the child goes on. The parent exits with 0 once ``detach``
    is called, and with the child's exit code when that ended before; what the
    child says until then is on the standard error of both. The working folder stays.
    """

    def __init__(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        reading, self._parent = os.pipe()
        # An interrupt that comes before the parent can pass it on would leave the child alone.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        child = os.fork()
        if child:
            os.close(self._parent)
            sys.exit(_await_ready(reading, child, before))
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(reading)
        os.setsid()
        _lead_nowhere(0)

    def detach(self, *, keep_stderr: bool) -> None:
        """
        Let go of the terminal, and of the parent.

        Raises:
            CommandError: The parent is gone: whoever started the server has given it up.
        """
        sys.stdout.flush()
        sys.stderr.flush()
        _lead_nowhere(1)
        if not keep_stderr:
            _lead_nowhere(2)
        try:
            os.write(self._parent, b"1")
        except BrokenPipeError:
            raise CommandError("Whoever started the server did not wait until it was ready.") from None
        os.close(self._parent)


def _await_ready(reading: int, child: int, signals: Iterable[int]) -> int:
    """The parent's exit code; ``signals`` are those to be blocked from now on."""
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, signals)
        with os.fdopen(reading, "rb") as stream:
            if stream.read(1):
                return 0
    except KeyboardInterrupt:
        os.kill(child, signal.SIGTERM)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code < 0:
        name = signal.Signals(-code).name
        sys.stderr.write(f"The server was ended by {name} before it was ready.\n")
    return code if code > 0 else 1


def _lead_nowhere(descriptor: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, descriptor)
    os.close(null)


class PidFile:
    """
    A file with this process's number, which no other server can hold at the same time.

    It is held by a lock, so that one left by a process that was killed is no
    hindrance. Use it as a context: the end of the block removes the file.

    Raises:
        CommandError: Another server holds it, or it is no pid file.
    """

    def __init__(self, path: str) -> None:
        self._path = os.path.abspath(path)
        self._descriptor = self._open()
        content = os.read(self._descriptor, 64).strip()
        if content and not content.isdigit():
            os.close(self._descriptor)
            raise CommandError(f"{path} is no pid file: it holds something else, and would be lost.")
        # The number of a server that does not lock, or did not end well, stays until ours stands there.
        self._is_ours = not content

    def _open(self) -> int:
        while True:
            try:
                # Following a link that somebody laid there, root would write anywhere.
                descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
            except OSError as error:
                raise CommandError(f"Cannot write the pid file {self._path}: {error.strerror}.") from error
            try:
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise CommandError(f"{self._path} is no pid file: it is not a regular file.")
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(descriptor, 64).decode(errors="replace").strip() or "that is starting"
                os.close(descriptor)
                raise CommandError(
                    f"Another server, process {holder}, holds the pid file {self._path}: "
                    "stop it, or name another --pid-file."
                ) from None
            except BaseException:
                os.close(descriptor)
                raise
            if self._is_there(descriptor):
                return descriptor
            # Its holder removed it between the two steps.
            os.close(descriptor)

    def _is_there(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.lstat(self._path), os.fstat(descriptor))
        except FileNotFoundError:
            return False

    def write(self) -> None:
        """Write this process's number: the server is ready."""
        try:
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, b"%d\n" % os.getpid(), 0)
        except OSError as error:
            raise CommandError(f"Cannot write the pid file {self._path}: {error.strerror}.") from error
        self._is_ours = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_ours:
            try:
                if self._is_there(self._descriptor):
                    os.unlink(self._path)
            except OSError:
                # The folder is closed to the user who was switched to.
                os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)


def check_user(name: str) -> pwd.struct_passwd:
    """
    Whom ``switch_user`` would become.

    Raises:
        CommandError: There is no such user, or this process may not become him.
    """
    try:
        user = pwd.getpwnam(name)
    except KeyError:
        raise CommandError(f"This machine has no user {name!r}, whom --user names.") from None
    if os.geteuid() not in (0, user.pw_uid):
        raise CommandError(f"Only root may become {name!r}: start the server as root, or without --user.")
    return user


def switch_user(name: str) -> None:
    """
    Become another user, with his groups, for good.

    Raises:
        CommandError: This process may not.
    """
    user = check_user(name)
    if os.geteuid() != 0 or user.pw_uid == 0:
        return
    try:
        os.initgroups(user.pw_name, user.pw_gid)
        os.setgid(user.pw_gid)
        os.setuid(user.pw_uid)
    except OSError as error:
        raise CommandError(f"Cannot become {name!r}: {error.strerror}.") from error
    # Database drivers look for files there, and root's would be closed to them.
    os.environ.update(HOME=user.pw_dir, USER=user.pw_name, LOGNAME=user.pw_name)


def allow_descriptors(number: int | None, wanted: int) -> int:
    """
    Set how many files and connections this process may have open.

    Args:
        number: The limit; None to raise it to ``wanted``, as far as that is allowed.
    Returns:
        The limit that holds now.
    Raises:
        CommandError: ``number`` is more than this process may have.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if number is None:
        if soft == unlimited:
            return wanted
        limit = max(soft, wanted if hard == unlimited else min(hard, wanted))
    else:
        limit = number
        hard = hard if hard == unlimited else max(hard, limit)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    except (OSError, ValueError) as error:
        if number is None:
            return soft
        raise CommandError(
            f"{limit} file descriptors are more than this process may have: lower --file-descriptors, "
            "or raise the limit (LimitNOFILE of systemd, ulimit -Hn of the shell)."
        ) from error
    return limit


def allow_core_dumps() -> None:
    """Have the system keep the memory of a process that crashes, as large as it permits."""
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
