"""
A connection as the core knows it, and the replies that hold their places in its line.

No behaviour: what is done with them is the core's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from ipaddress import ip_address
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from .jobs import Function, Job


class Answer:
    """A reply that holds its place in the peer's line until its content is known."""

    __slots__ = ("data", "peer")

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.data: bytes | None = None


class Peer:
    """One connection: client, worker or both."""

    __slots__ = (
        "abilities",
        "address",
        "asleep",
        "attempts",
        "cancelled",
        "client_id",
        "crew",
        "enlisted",
        "exceptions",
        "excused",
        "is_patient",
        "line",
        "lined",
        "listens",
        "number",
        "output",
        "retry",
        "running",
        "shell",
        "timeouts",
        "waits",
        "woken_for",
    )

    def __init__(self, number: int, address: str, *, exceptions: bool, shell: object) -> None:
        self.number = number
        """Descriptor of the socket, as ``workers`` shows it."""
        self.address = address
        self.client_id = b"-"
        self.exceptions = exceptions
        self.abilities: dict[bytes, Function] = {}
        self.timeouts: dict[bytes, float] | None = None
        """{function: seconds that it may take}, for those that it offered with a time limit."""
        self.asleep = False
        self.enlisted = False
        """Whether it stands among the sleepers of every function it offers."""
        self.running: dict[bytes, Job] = {}
        self.listens: set[Job] = set()
        self.attempts = False
        """Whether it speaks of attempts: the extension that ``packets.ATTEMPTS`` tells of."""
        self.crew = b""
        """The token that it shares with those that it works with; empty when it named none."""
        self.retry: tuple[bytes, float] | None = None
        """Handle of the job whose exception comes next and is not its end; seconds until another attempt."""
        self.excused: bytes | None = None
        """Handle of its last WORK_EXCEPTION: Perl's workers send WORK_FAIL after it."""
        self.cancelled: dict[bytes, None] = {}
        """Handles of jobs that were cancelled while it ran them: it goes on, and need not hear of it."""
        self.output: list[bytes] = []
        """What the shell is to send."""
        self.is_patient = False
        """Whether it waits for nothing of that: it stands among the ``patient``, not among the ``dirty``."""
        self.line: deque[bytes | Answer] | None = None
        """Replies behind one that waits for its commit, which is the first; None when none waits."""
        self.lined = 0
        """Bytes of those of them that are known."""
        self.waits = False
        """Whether it takes a job without asking again: the extension that ``packets.WAITS`` tells of."""
        self.woken_for: Function | None = None
        """Whose job it was woken for, until it grabs."""
        self.shell = shell
        """The transport's own; the core does not look at it."""

    @property
    def identity(self) -> bytes:
        return self.client_id if self.client_id != b"-" else self.address.encode()

    @property
    def local(self) -> bool:
        """Whether it is on this machine: a unix socket or the loopback address."""
        if self.address == "unix":
            return True
        try:
            address = ip_address(self.address)
        except ValueError:
            return False
        # What an IPv6 socket shows of an IPv4 peer is no loopback address to Python before 3.13.
        return (getattr(address, "ipv4_mapped", None) or address).is_loopback


Handler: TypeAlias = Callable[[Peer, list[bytes]], None]
"""What to do with a packet, given its arguments."""
