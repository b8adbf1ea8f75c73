"""
Who wants to hear that the end of a row, or of a group, is in the database.

A view that waits for a job which it has just inserted knows its row's number
and no handle: the row may not have been claimed yet. What it wants to hear is
not that the job ended but that its record says so. See ``packets.ROW``, and
``packets.GROUP`` for all members of a group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ..protocol.packets import GROUP, ROW

if TYPE_CHECKING:
    from .entries import JobFinished
    from .peers import Peer

MOST: Final = 10_000
"""Rows and groups that are watched at a time; who asks for more looks there now and then."""

LONGEST: Final = 60.0
"""Seconds after which a row is forgotten, unless it is asked for again: its job may be another server's."""


LARGEST: Final = 64 * 1024
"""Bytes of a value that is told along; who waits reads a larger one from the row."""


def told_of_row(end: JobFinished, began: float) -> bytes:
    """What the row of a job says that has succeeded at its first attempt; nothing where that is too much."""
    if len(end.data) > LARGEST:
        return b""
    return b"\0".join([end.handle, repr(began).encode(), repr(end.at).encode(), end.data])


class Watchers:
    """
    Peers by the row or the group that they wait for.

    Args:
        prefix: What the handles of rows begin with; their number follows.
    """

    def __init__(self, prefix: bytes) -> None:
        self._prefix = prefix
        self._rows: dict[bytes, tuple[float, dict[Peer, int]]] = {}
        """{handle of a row, or ``group NUMBER``: since when, by whom and how often}, the longest first."""
        self._of_peers: dict[Peer, set[bytes]] = {}

    def __bool__(self) -> bool:
        return bool(self._rows)

    def add(self, peer: Peer, what: bytes, clock: float) -> bool:
        """
        Whether the peer will hear of ``row NUMBER`` or ``group NUMBER``, once for each time it asked.

        Not when too many are watched, or it is none.
        """
        is_group = what.startswith(GROUP)
        number = what.removeprefix(GROUP if is_group else ROW)
        if not number.isdigit() or len(number) > 20 or len(self._rows) >= MOST:
            return False
        key = what if is_group else self._prefix + number
        _, peers = self._rows.pop(key, (0.0, {}))
        peers[peer] = peers.get(peer, 0) + 1
        self._rows[key] = clock, peers
        self._of_peers.setdefault(peer, set()).add(key)
        return True

    def waits_for(self, handle: bytes) -> bool:
        """Whether anybody waits for the row of a handle."""
        return handle in self._rows

    def ended(self, handle: bytes) -> tuple[bytes, list[Peer]]:
        """What the row of a handle is called, and who waits for it; they are forgotten."""
        return ROW + handle[len(self._prefix) :], self._remove(handle)

    def group_ended(self, id: int) -> tuple[bytes, list[Peer]]:
        """What a group is called, and who waits for it; they are forgotten."""
        name = GROUP + b"%d" % id
        return name, self._remove(name)

    def forget(self, peer: Peer) -> None:
        """A peer is gone."""
        for handle in self._of_peers.pop(peer, ()):
            _, peers = self._rows[handle]
            del peers[peer]
            if not peers:
                del self._rows[handle]

    def tick(self, clock: float) -> None:
        """Forget what nobody can have waited for so long without looking by himself."""
        while self._rows:
            handle, (since, _) = next(iter(self._rows.items()))
            if clock - since < LONGEST:
                return
            self._remove(handle)

    def _remove(self, handle: bytes) -> list[Peer]:
        _, peers = self._rows.pop(handle, (0.0, {}))
        for peer in peers:
            handles = self._of_peers[peer]
            handles.discard(handle)
            if not handles:
                del self._of_peers[peer]
        return [peer for peer, times in peers.items() for _ in range(times)]
