"""
The administrative protocol, told from the core.

Lines of words in, lines of text out; the replies are gearmand's to the byte,
with ``\\n`` after listings and values and ``\\r\\n`` after OK and ERR alone.
Where gearmand's command does something else than it says, ours does what it
says, and the core's method tells the difference.
PROTOCOL: "Administrative Protocol".
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from typing import Final
from urllib.parse import quote_plus

from .. import __version__
from ..protocol.packets import atoi
from .abilities import is_printable
from .core import JobServer
from .entries import Outcome
from .jobs import JobState
from .options import Shutdown
from .peers import Peer

MAX_WORDS: Final = 5
"""gearmand closes a connection whose line has more; so do we, see ``answer``."""

_OK: Final = b"OK\r\n"
_NOT_HERE: Final = b"ERR PERMISSION_DENIED This+command+is+taken+from+the+server's+own+machine+alone\r\n"

Question = Callable[[JobServer, list[bytes]], bytes]
Change = Callable[[JobServer, Peer, list[bytes]], bytes]


def is_http(line: bytes) -> bool:
    """
    Whether a browser or the like says it: the connection is to be closed, and nothing to be answered.

    Any page may have a browser send to any port of its machine, and in what follows there may be packets.
    """
    words = line.lower().split()
    return bool(words) and (words[-1].startswith(b"http/1.") or words[0] == b"host:")


def answer(server: JobServer, peer: Peer, line: bytes) -> bytes | None:
    """The reply to one line, with its line end; None when the connection is to be closed."""
    words = [word for word in line.split(b" ") if word]
    if len(words) > MAX_WORDS:
        return None
    # A leading space makes an unknown command, as in gearmand.
    if not words or line.startswith(b" "):
        return _unknown(b"")
    name = words[0].lower()
    if name in _QUESTIONS:
        return _QUESTIONS[name](server, words)
    if name not in _CHANGES or (name == b"shutdown" and not server.options.allow_shutdown):
        return _unknown(words[0])
    return _CHANGES[name](server, peer, words) if peer.local else _NOT_HERE


# Questions.


def _status(server: JobServer, words: list[bytes]) -> bytes:
    return _listing(
        b"%s\t%d\t%d\t%d" % (function.name, function.total, function.running, len(function.workers))
        for function in server.functions.values()
    )


def _priority_status(server: JobServer, words: list[bytes]) -> bytes:
    return _listing(
        b"%s\t%d\t%d\t%d\t%d" % (function.name, *function.count_waiting(), len(function.workers))
        for function in server.functions.values()
    )


def _workers(server: JobServer, words: list[bytes]) -> bytes:
    rows = []
    for peer in server.peers:
        # The last registered comes first, as gearmand lists them.
        functions = b"".join(b" " + name for name in reversed(peer.abilities))
        rows.append(b"%d %s %s :%s" % (peer.number, peer.address.encode(), _shown(peer.client_id), functions))
    return _listing(rows)


def _show(server: JobServer, words: list[bytes]) -> bytes:
    what = [word.lower() for word in words[1:]]
    if what == [b"jobs"]:
        return _jobs(server)
    if what == [b"unique", b"jobs"]:
        return _uniques(server)
    return b"ERR UNKNOWN_SHOW_ARGUMENTS\r\n" if what else _unknown(words[0])


def _jobs(server: JobServer) -> bytes:
    rows = []
    for job in server.jobs.values():
        if job.state is not JobState.PENDING:
            retries = job.attempts - (job.state is JobState.RUNNING)
            abandoned = not job.background and not job.listeners
            rows.append(b"%s\t%d\t%d\t%d" % (job.handle, retries, abandoned, job.background))
    return _listing(rows)


def _uniques(server: JobServer) -> bytes:
    uniques = (job.unique for job in server.jobs.values() if job.state is not JobState.PENDING)
    # A dot alone would end the listing.
    return _listing(b"?" if unique == b"." else _shown(unique) for unique in uniques)


def _running(server: JobServer, words: list[bytes]) -> bytes:
    """
    Who runs what; in no other server.

    For each job: handle, function, descriptor of the worker's connection, attempt, seconds
    since it was handed out, and how far it is. Those handed out first come first.
    """
    jobs = [(job, peer) for peer in server.peers for job in peer.running.values()]
    jobs.sort(key=lambda row: row[0].started_at)
    return _listing(
        b"%s\t%s\t%d\t%d\t%d\t%d\t%d"
        % (
            job.handle,
            job.function.name,
            peer.number,
            job.attempts,
            max(server.now - job.started_at, 0.0),
            atoi(job.numerator),
            atoi(job.denominator),
        )
        for job, peer in jobs
    )


def _counters(server: JobServer, words: list[bytes]) -> bytes:
    """
    What has become of each function's jobs since the server started; in no other server.

    Submitted, handed out, tried again, and ended: successful, failed, dead, cancelled.
    """
    rows = []
    for function in server.functions.values():
        counts = function.tally
        numbers = [counts.submitted, counts.started, counts.retried]
        numbers += [counts.finished[outcome] for outcome in Outcome]
        rows.append(b"\t".join([function.name, *(b"%d" % number for number in numbers)]))
    return _listing(rows)


def _limits(server: JobServer, words: list[bytes]) -> bytes:
    """
    Which functions are limited, and how it stands here; in no other server.

    Function, jobs that may begin in a period, its seconds, jobs that may run at once (0 for any number),
    whether that is so for each key, permits that this server has, jobs that wait for one.
    """
    return _listing(
        b"%s\t%d\t%d\t%d\t%d\t%d\t%d"
        % (
            limiter.name,
            limiter.limit.rate or 0,
            limiter.limit.period,
            limiter.limit.concurrency or 0,
            limiter.limit.keyed,
            held,
            blocked,
        )
        for limiter, held, blocked in server.limits.standing()
    )


def _process_id(server: JobServer, words: list[bytes]) -> bytes:
    return b"OK %d\n" % os.getpid()


def _verbosity(server: JobServer, words: list[bytes]) -> bytes:
    # Of gearmand's eight names those that Python's levels have.
    level = logging.getLogger("django_gearman").getEffectiveLevel()
    for limit, name in _LEVELS.items():
        if level <= limit:
            return b"OK %s\n" % name
    return b"OK CRITICAL\n"


def _version(server: JobServer, words: list[bytes]) -> bytes:
    return b"OK %s\n" % __version__.encode()


# Changes.


def _cancel(server: JobServer, peer: Peer, words: list[bytes]) -> bytes:
    if len(words) < 3:
        return _unknown(words[0])
    if len(words) > 3 or words[1].lower() != b"job":
        return b"ERR UNKNOWN_ERROR\r\n"
    # Only the store may know the job: the answer has its place, and comes in its time.
    server.cancel_for(peer, words[2], _OK, b"ERR UNKNOWN_JOB\r\n")
    return b""


def _create(server: JobServer, peer: Peer, words: list[bytes]) -> bytes:
    if len(words) != 3 or words[1].lower() != b"function":
        return _incomplete(words[0])
    refusal = server.abilities.create(words[2])
    if refusal is None:
        return _OK
    code, text = refusal
    return b"ERR %s %s\r\n" % (code, text.replace(b" ", b"+"))


def _drop(server: JobServer, peer: Peer, words: list[bytes]) -> bytes:
    if len(words) != 3 or words[1].lower() != b"function":
        return _incomplete(words[0])
    # gearmand finds the name without looking at case, and may drop another function.
    if words[2] not in server.functions:
        return b"ERR function not found\r\n"
    if not server.abilities.drop(words[2]):
        return b"ERR there are still connected workers or executing clients\r\n"
    return _OK


def _limit(server: JobServer, peer: Peer, words: list[bytes]) -> bytes:
    if len(words) < 2:
        return _incomplete(words[0])
    limits = [max(atoi(word), 0) for word in words[2:]]
    if len(limits) == 1:
        limits *= 3
    high, normal, low = (*limits, 0, 0, 0)[:3]
    server.abilities.limit(words[1], high, normal, low)
    return _OK


def _shut_down(server: JobServer, peer: Peer, words: list[bytes]) -> bytes:
    how = [word.lower() for word in words[1:]]
    if how not in ([], [b"graceful"]):
        return _incomplete(words[0])
    server.shut_down(Shutdown.GRACEFUL if how else Shutdown.IMMEDIATE)
    return _OK


# Small parts.


def _listing(rows: Iterable[bytes]) -> bytes:
    return b"".join(row + b"\n" for row in rows) + b".\n"


def _unknown(word: bytes) -> bytes:
    # As it came, like gearmand, unless it would speak to a terminal.
    shown = word if is_printable(word) else quote_plus(word).encode()
    return b"ERR UNKNOWN_COMMAND Unknown+server+command%s\r\n" % shown


def _incomplete(word: bytes) -> bytes:
    return b"ERR INVALID_ARGUMENTS An+incomplete+set+of+arguments+was+sent+to+this+command+%s\r\n" % word


def _shown(name: bytes) -> bytes:
    """A peer's own words, such that they neither forge a row nor speak to a terminal."""
    if is_printable(name):
        return name
    text = name.decode(errors="replace")
    return "".join(character if is_printable(character.encode()) else "?" for character in text).encode()


_LEVELS: Final = {
    logging.DEBUG: b"DEBUG",
    logging.INFO: b"INFO",
    logging.WARNING: b"WARNING",
    logging.ERROR: b"ERROR",
}
_QUESTIONS: Final[dict[bytes, Question]] = {
    b"status": _status,
    b"prioritystatus": _priority_status,
    b"workers": _workers,
    b"show": _show,
    b"getpid": _process_id,
    b"verbose": _verbosity,
    b"version": _version,
    b"running": _running,
    b"counters": _counters,
    b"limits": _limits,
}
_CHANGES: Final[dict[bytes, Change]] = {
    b"cancel": _cancel,
    b"create": _create,
    b"drop": _drop,
    b"maxqueue": _limit,
    b"shutdown": _shut_down,
}
"""Taken from the server's own machine alone: nothing else tells an operator from anybody else."""
