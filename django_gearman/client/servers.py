"""
Which job server to ask next, and which ones to leave alone for a while.

No sockets: who connects says what came of it. Safe to share between threads
without a lock, which a fork could leave locked: two threads at once may at
worst both try a server that was given up.
"""

from __future__ import annotations

import random
from bisect import bisect
from collections.abc import Callable, Collection, Sequence
from hashlib import blake2b
from time import monotonic
from typing import Final

from ..addresses import split_address
from ..exceptions import ConnectionFailed, ConnectionLost, ResultTooLarge
from .core import JobRequest

CIRCUIT: Final = 5.0
"""Seconds during which a server that could not be reached is not tried when there is a choice."""

LONGEST_CIRCUIT: Final = 60.0
"""Seconds between two attempts at a server that stays away, at the most."""

QUICK: Final = 0.1
"""Seconds in which a failure costs nobody anything."""

_POINTS: Final = 160
"""Places of a server on the ring: enough that shares differ by some percent."""


class _Circuit:
    """What is remembered of a server that failed."""

    __slots__ = ("is_tried", "pause", "shut_until", "waits")

    def __init__(self, pause: float, shut_until: float, *, waits: bool) -> None:
        self.pause = pause
        self.shut_until = shut_until
        self.waits = waits
        """Whether its failure took time: such a server is not even tried last."""
        self.is_tried = False
        """Whether somebody has tried it since."""


class Servers:
    """
    The job servers of a client, in the order to try them.

    Args:
        names: ``host:port`` of each, in order of preference.
        spread: Choose by a hash of the unique, so that equal jobs meet; jobs
            without one go anywhere. Else the first that answers gets all.
        circuit: Seconds for which a server that failed is left alone; twice as
            long after each further failure, up to a minute.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        spread: bool = False,
        circuit: float = CIRCUIT,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        if isinstance(names, str) or not names:
            raise ValueError(f'servers must be a sequence such as ["127.0.0.1:4730"], not {names!r}')
        for name in names:
            split_address(name)  # raises what is wrong with it, now rather than at the first use
        self.names = tuple(dict.fromkeys(names))
        self._circuit = circuit
        self._clock = clock
        self._circuits: dict[str, _Circuit] = {}
        self._ring: list[tuple[int, str]] = []
        if spread and len(self.names) > 1:
            self._ring = sorted(
                (_point(b"%s %d" % (name.encode(), number)), name)
                for name in self.names
                for number in range(_POINTS)
            )

    def order(self, key: bytes = b"") -> list[str]:
        """
        Servers to try for a job, the best first; none when each is known not to answer.

        Args:
            key: What equal jobs have in common; empty for nothing.
        """
        preferred = self._around(key) if self._ring else self.names
        if not self._circuits:
            return list(preferred)
        now = self._clock()
        shut = {name: each for name, each in tuple(self._circuits.items()) if each.shut_until > now}
        last = [name for name in preferred if name in shut and not shut[name].waits]
        return [name for name in preferred if name not in shut] + last

    def _around(self, key: bytes) -> list[str]:
        """Servers as they come on the ring from a key's point on: without one, only its own jobs move."""
        point = _point(key) if key else random.getrandbits(64)
        start = bisect(self._ring, (point, ""))
        found: dict[str, None] = {}
        for number in range(len(self._ring)):
            found[self._ring[(start + number) % len(self._ring)][1]] = None
            if len(found) == len(self.names):
                break
        return list(found)

    def is_shut(self, name: str) -> bool:
        """Whether the server failed a moment ago."""
        circuit = self._circuits.get(name)
        return circuit is not None and circuit.shut_until > self._clock()

    def may_hang(self, name: str) -> bool:
        """Whether it was waited for in vain, however long ago: what was connected before may hang too."""
        circuit = self._circuits.get(name)
        return circuit is not None and circuit.waits

    def is_suspected(self, name: str) -> bool:
        """Whether it may only have been slow: see ``suspect``."""
        circuit = self._circuits.get(name)
        return circuit is not None and not circuit.pause

    def trying(self, name: str) -> None:
        """
        Somebody connects to it: nobody else is to wait for a server that may still be away.

        One that is only suspected may be healthy: that passes nobody over.
        """
        circuit = self._circuits.get(name)
        if circuit is not None and circuit.shut_until <= (now := self._clock()):
            circuit.shut_until = now + circuit.pause
            circuit.is_tried = True

    def failed(self, name: str, *, waited: bool | None) -> None:
        """
        It did not answer.

        Of all that wait for it together the first counts: the others tell nothing new.

        Args:
            waited: Whether that took time, as when its machine is away; a refusal takes none.
                None when nobody had the patience to find out.
        """
        circuit = self._circuits.get(name)
        if waited is None:
            waited = circuit is not None and circuit.waits
        if waited and circuit is not None and circuit.waits and not circuit.is_tried and self.is_shut(name):
            return
        pause = self._circuit if circuit is None else min(circuit.pause * 2 or self._circuit, LONGEST_CIRCUIT)
        if not waited:
            # Trying it costs nothing.
            pause = self._circuit
        self._circuits[name] = _Circuit(pause, self._clock() + pause, waits=waited)

    def suspect(self, name: str) -> None:
        """It did not answer for as long as its caller would wait: others ask first whether it is there."""
        if name not in self._circuits:
            self._circuits[name] = _Circuit(0.0, self._clock(), waits=True)

    def answered(self, name: str) -> None:
        """It is there."""
        self._circuits.pop(name, None)

    def unreachable(self) -> ConnectionFailed:
        """Why no server is tried at all."""
        now = self._clock()
        soonest = min((each.shut_until for each in tuple(self._circuits.values())), default=now)
        reason = f"it did not answer a moment ago and is tried again in {max(soonest - now, 0.0):.1f} s"
        return ConnectionFailed(", ".join(self.names), reason)


class Route:
    """
    The way of one request from server to server.

    Args:
        resubmit: Whether a foreground job may run a second time when its connection breaks.
    """

    def __init__(self, servers: Servers, request: JobRequest | None, *, resubmit: bool = False) -> None:
        self._servers = servers
        self._request = request
        self._resubmit = resubmit
        self._tried: set[str] = set()
        self._moves = 0
        self._lost: ConnectionLost | None = None

    def candidates(self) -> list[str]:
        """
        Servers to try now, the best first.

        Raises:
            ConnectionFailed: None is left, or ConnectionLost when one had the request.
        """
        key = b"" if self._request is None else self._request.key
        left = [name for name in self._servers.order(key) if name not in self._tried]
        if not left:
            raise self._lost or self._servers.unreachable()
        return left

    def may_return(self) -> bool:
        """
        Whether to try once more those that broke with the request, since no candidate could be reached.

        Of two servers that are restarted in turn, the first is back when the second is away.
        """
        if not self._tried or self._moves >= 2 * len(self._servers.names):
            return False
        self._tried.clear()
        self._moves += 1
        return True

    def unreachable(self, failure: ConnectionFailed) -> ConnectionFailed | ConnectionLost:
        """What to raise when no candidate could be reached."""
        return self._lost or failure

    def lost(self, name: str, error: ConnectionLost) -> None:
        """
        The connection broke with the request in flight: it goes to another server, if it may.

        A background job that was not acknowledged may then be there twice, as
        at-least-once allows; one that was is the server's. A foreground job may
        have run.

        Raises:
            ConnectionLost: It may not.
        """
        if self._request is not None:
            # A call-back may have lost a connection of its own.
            of_a_callback = error is self._request.raised
            may_move = self._request.may_move(resubmit=self._resubmit)
            if of_a_callback or isinstance(error, ResultTooLarge) or not may_move:
                raise error
            self._request.start_over()
        self._lost = error
        self._moves += 1
        if self._resubmit and self._moves < 2 * len(self._servers.names):
            # One that broke before may be back by now.
            self._tried.clear()
        self._tried.add(name)


def allowance(candidates: Collection[str], timeout: float) -> float:
    """Seconds that connecting to the first of the candidates may take: half where there are others."""
    return timeout / 2 if len(candidates) > 1 else timeout


def took_time(error: ConnectionFailed, seconds: float, allowed: float) -> bool:
    """
    Whether it cost somebody time that a server could not be reached.

    A refusal does not, though a process that is busy is late to hear of it.
    """
    is_refusal = isinstance(error.__cause__, ConnectionRefusedError)
    return seconds > (allowed if is_refusal else QUICK)


def _point(key: bytes) -> int:
    return int.from_bytes(blake2b(key, digest_size=8).digest(), "big")
