"""
The packets of the Gearman protocol, as data.

A packet is a 12-byte header (magic, type, size of the body, big-endian) and a
body of arguments, each but the last ended by one NUL. Source: gearmand's
PROTOCOL document; the argument table here is its "Binary Packet" sections.
"""

from __future__ import annotations

from enum import IntEnum
from struct import Struct

HEADER_SIZE = 12
REQUEST = b"\0REQ"
"""Magic of a packet to the server."""
RESPONSE = b"\0RES"
"""Magic of a packet from the server."""

CLAIM = b"gearman:claim"
"""
A function that our job server serves itself: submitted in the background, it
makes the server look for new rows in its database. No import path has a colon.
"""

LISTEN = b"listen "
"""
OPTION_REQ ``listen HANDLE``, to our job server: hear of a job as who submitted it in the foreground does.

Answered by OPTION_RES when the server holds the job, and by ERROR JOB_NOT_FOUND when it does
not: it ended, or is another server's. No other server knows the option.
"""

ROW = b"row "
"""
OPTION_REQ ``listen row NUMBER``, to a job server that keeps its jobs in a database: hear of a row's end.

For who inserted the row and cannot know its handle yet. Answered by OPTION_RES at once, and by
WORK_COMPLETE of ``row NUMBER`` when the row says how its job ended, whichever way. Its data are what
the row says of a job that succeeded at once: handle, begin and end in seconds since 1970, and the
value, with a NUL between each; and nothing of any other job, or of a large value. Nothing follows
when another server has it; who waits looks at the row now and then.
"""

GROUP = b"group "
"""
OPTION_REQ ``listen group NUMBER``, as ``listen row NUMBER``: hear that all members of a group have ended.

WORK_COMPLETE of ``group NUMBER`` comes from the server that has written the end of the last of them, be
it another than the one that was asked first: who waits asks each.
"""

ATTEMPTS = b"attempts"
"""
An option of our job server: the worker speaks of attempts.

It is then sent OPTION_RES ``attempt N M`` ahead of each job that is not simply
handed out for the first time: the N-th of M attempts, M 0 when the job has no
number of its own. No other server knows the option; all answer UNKNOWN_OPTION.
"""

WAITS = b"waits"
"""
An option of our job server, for workers of its own machine.

Who then asks with GRAB_JOB_UNIQ and is told NO_JOB is asleep, without PRE_SLEEP; a job for it comes
as JOB_ASSIGN_UNIQ, without NOOP and another question. Workers of other machines are answered
UNKNOWN_OPTION, as by all other servers: when a machine is gone nobody says so, and what it was
handed would be gone as long.
"""

RETRY = b"retry "
"""
OPTION_REQ ``retry MILLISECONDS HANDLE``, from a worker that speaks of attempts.

The WORK_EXCEPTION of the job that follows is not its end: a background job with
attempts left waits so long and is handed out again. Has no answer.
"""

LOGS = b"logs"
"""
An option of our job server, when it keeps records: it takes what jobs log.

Who was answered OPTION_RES ``logs`` may send the words of ``LOG``. No other
server knows the option; all answer UNKNOWN_OPTION.
"""

LOG = b"log "
"""
OPTION_REQ ``log HANDLE TEXT``, from a worker that was answered ``logs``.

TEXT is all that is to be kept of what the job's attempt has logged so far:
lines of UTF-8, the last of them. Each takes the place of the one before. Has no answer.
"""

MAX_LOG = 16 * 1024
"""Bytes of TEXT in ``log HANDLE TEXT``; of a longer one the end is kept."""

CREW = b"crew "
"""
OPTION_REQ ``crew TOKEN``, from a worker that speaks of attempts: it is one of a crew.

The words that follow are said by such peers alone; ``lead`` alone is answered.
"""

LEAD = b"lead "
"""
OPTION_REQ ``lead TOKEN``, answered with OPTION_RES ``lead``: the peer speaks for the crew of that token.

When one of the crew's connections is lost, its jobs wait a moment for the lead's word.
"""

HOLD = b"hold "
"""
OPTION_REQ ``hold HANDLE``, from a lead that has come back: one of its crew is at the job still.

Nobody else is handed it while the lead is there, until it says something else of it.
"""

LOST = b"lost "
"""OPTION_REQ ``lost HANDLE REASON``, from a lead: the process that ran the job is gone, and why."""

RETURN = b"return "
"""
OPTION_REQ ``return HANDLE``, from a lead or the job's own worker: it goes back to the queue.

That attempt does not count. From a worker, without a handle: all that it was handed; it ``waits`` no more.
"""

RESUME = b"resume "
"""
OPTION_REQ ``resume ATTEMPT HANDLE``, from a worker whose connection broke while it had the job.

It has the job again, if nobody was handed it since. Otherwise nothing happens.
"""

LEAVING = b"leaving"
"""OPTION_REQ ``leaving``, from a lead: its workers finish what they have. A server that ends waits."""

CANCEL = b"cancel "
"""OPTION_RES ``cancel HANDLE``, to a lead, or to a worker without one: a job that is run is no more."""

CLAIMED = b"claim"
"""What the handle ends with that our server answers then; gearmand's end with a number."""

_size = Struct(">I")


class PacketType(IntEnum):
    """PROTOCOL: "Binary Packet", the number of each type. 5 is not in use."""

    CAN_DO = 1
    CANT_DO = 2
    RESET_ABILITIES = 3
    PRE_SLEEP = 4
    NOOP = 6
    SUBMIT_JOB = 7
    JOB_CREATED = 8
    GRAB_JOB = 9
    NO_JOB = 10
    JOB_ASSIGN = 11
    WORK_STATUS = 12
    WORK_COMPLETE = 13
    WORK_FAIL = 14
    GET_STATUS = 15
    ECHO_REQ = 16
    ECHO_RES = 17
    SUBMIT_JOB_BG = 18
    ERROR = 19
    STATUS_RES = 20
    SUBMIT_JOB_HIGH = 21
    SET_CLIENT_ID = 22
    CAN_DO_TIMEOUT = 23
    ALL_YOURS = 24
    WORK_EXCEPTION = 25
    OPTION_REQ = 26
    OPTION_RES = 27
    WORK_DATA = 28
    WORK_WARNING = 29
    GRAB_JOB_UNIQ = 30
    JOB_ASSIGN_UNIQ = 31
    SUBMIT_JOB_HIGH_BG = 32
    SUBMIT_JOB_LOW = 33
    SUBMIT_JOB_LOW_BG = 34
    SUBMIT_JOB_SCHED = 35
    SUBMIT_JOB_EPOCH = 36
    SUBMIT_REDUCE_JOB = 37
    SUBMIT_REDUCE_JOB_BACKGROUND = 38
    GRAB_JOB_ALL = 39
    JOB_ASSIGN_ALL = 40
    GET_STATUS_UNIQUE = 41
    STATUS_RES_UNIQUE = 42


ARGUMENTS: dict[PacketType, tuple[str, ...]] = {
    PacketType.CAN_DO: ("function",),
    PacketType.CANT_DO: ("function",),
    PacketType.RESET_ABILITIES: (),
    PacketType.PRE_SLEEP: (),
    PacketType.NOOP: (),
    PacketType.SUBMIT_JOB: ("function", "unique", "workload"),
    PacketType.JOB_CREATED: ("handle",),
    PacketType.GRAB_JOB: (),
    PacketType.NO_JOB: (),
    PacketType.JOB_ASSIGN: ("handle", "function", "workload"),
    PacketType.WORK_STATUS: ("handle", "numerator", "denominator"),
    PacketType.WORK_COMPLETE: ("handle", "data"),
    PacketType.WORK_FAIL: ("handle",),
    PacketType.GET_STATUS: ("handle",),
    PacketType.ECHO_REQ: ("data",),
    PacketType.ECHO_RES: ("data",),
    PacketType.SUBMIT_JOB_BG: ("function", "unique", "workload"),
    PacketType.ERROR: ("code", "text"),
    PacketType.STATUS_RES: ("handle", "known", "running", "numerator", "denominator"),
    PacketType.SUBMIT_JOB_HIGH: ("function", "unique", "workload"),
    PacketType.SET_CLIENT_ID: ("id",),
    PacketType.CAN_DO_TIMEOUT: ("function", "timeout"),
    PacketType.ALL_YOURS: (),
    PacketType.WORK_EXCEPTION: ("handle", "data"),
    PacketType.OPTION_REQ: ("option",),
    PacketType.OPTION_RES: ("option",),
    PacketType.WORK_DATA: ("handle", "data"),
    PacketType.WORK_WARNING: ("handle", "data"),
    PacketType.GRAB_JOB_UNIQ: (),
    PacketType.JOB_ASSIGN_UNIQ: ("handle", "function", "unique", "workload"),
    PacketType.SUBMIT_JOB_HIGH_BG: ("function", "unique", "workload"),
    PacketType.SUBMIT_JOB_LOW: ("function", "unique", "workload"),
    PacketType.SUBMIT_JOB_LOW_BG: ("function", "unique", "workload"),
    PacketType.SUBMIT_JOB_SCHED: (
        "function",
        "unique",
        "minute",
        "hour",
        "day of month",
        "month",
        "day of week",
        "workload",
    ),
    PacketType.SUBMIT_JOB_EPOCH: ("function", "unique", "epoch", "workload"),
    # gearmand wants the aggregator that its document leaves out.
    PacketType.SUBMIT_REDUCE_JOB: ("function", "unique", "reducer", "aggregator", "workload"),
    PacketType.SUBMIT_REDUCE_JOB_BACKGROUND: ("function", "unique", "reducer", "aggregator", "workload"),
    PacketType.GRAB_JOB_ALL: (),
    PacketType.JOB_ASSIGN_ALL: ("handle", "function", "unique", "reducer", "workload"),
    PacketType.GET_STATUS_UNIQUE: ("unique",),
    PacketType.STATUS_RES_UNIQUE: ("unique", "known", "running", "numerator", "denominator", "client count"),
}
"""What a packet's body holds, in order."""

HIGHEST_TYPE = max(PacketType)

FROM_SERVER_ONLY = frozenset(
    {
        PacketType.NOOP,
        PacketType.JOB_CREATED,
        PacketType.NO_JOB,
        PacketType.JOB_ASSIGN,
        PacketType.ECHO_RES,
        PacketType.ERROR,
        PacketType.STATUS_RES,
        PacketType.OPTION_RES,
        PacketType.JOB_ASSIGN_UNIQ,
        PacketType.JOB_ASSIGN_ALL,
        PacketType.STATUS_RES_UNIQUE,
    }
)

LAST_MAY_BE_MISSING = frozenset(
    {
        PacketType.WORK_STATUS,
        PacketType.WORK_COMPLETE,
        PacketType.WORK_EXCEPTION,
        PacketType.WORK_DATA,
        PacketType.WORK_WARNING,
    }
)
"""
What a worker reports with its last argument left out counts as with an empty one.

Perl's Gearman::Worker leaves it out, with its NUL, where the data is "" or "0", and always in
``send_work_status``. It ends on an ERROR, and the job would take one worker after the other down.
"""

_BY_NUMBER = {kind.value: kind for kind in PacketType}

SEPARATORS: tuple[int | None, ...] = tuple(
    max(len(ARGUMENTS[_BY_NUMBER[number]]) - 1, 0) if number in _BY_NUMBER else None
    for number in range(HIGHEST_TYPE + 1)
)
"""By number of the type: how many NULs part its arguments; None where there is no such type."""

_REQUEST_HEADERS = tuple(REQUEST + _size.pack(kind) for kind in range(HIGHEST_TYPE + 1))
_RESPONSE_HEADERS = tuple(RESPONSE + _size.pack(kind) for kind in range(HIGHEST_TYPE + 1))
_pack_size = _size.pack


def encode_request(kind: PacketType, *arguments: bytes) -> bytes:
    """A packet to the server."""
    body = b"\0".join(arguments)
    return _REQUEST_HEADERS[kind] + _pack_size(len(body)) + body


def encode_response(kind: PacketType, *arguments: bytes) -> bytes:
    """A packet from the server. Nothing is checked: this is the server's hot path."""
    body = b"\0".join(arguments)
    return _RESPONSE_HEADERS[kind] + _pack_size(len(body)) + body


def atoi(number: bytes) -> int:
    """
    A number as C's ``atoi`` reads it: leading digits, else 0.

    The digits are bounded before they become an integer: a long run of them
    would cost time that grows with its square.
    """
    text = number.strip()[:20]
    sign = -1 if text[:1] == b"-" else 1
    digits = text[1:] if text[:1] in (b"+", b"-") else text
    length = 0
    while length < len(digits) and 0x30 <= digits[length] <= 0x39:
        length += 1
    return sign * int(digits[:length] or b"0")
