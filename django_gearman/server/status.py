"""How a job stands: GET_STATUS and GET_STATUS_UNIQUE, of what is here and of what only the store knows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..protocol.packets import PacketType, atoi, encode_response
from .entries import Reply, Standing, Topic
from .jobs import PENDING, RUNNING
from .results import MAX_HANDLE, until_nul

if TYPE_CHECKING:
    from .core import JobServer
    from .peers import Handler, Peer


class StatusRequests:
    """Both packets; what is asked of the store keeps its place among the client's answers."""

    def __init__(self, server: JobServer) -> None:
        self._server = server

    def handlers(self) -> dict[PacketType, Handler]:
        """What to do with each of them."""
        return {
            PacketType.GET_STATUS: self._get_status,
            PacketType.GET_STATUS_UNIQUE: self._get_status_unique,
        }

    def _get_status(self, peer: Peer, arguments: list[bytes]) -> None:
        server = self._server
        handle = until_nul(arguments[0])
        job = server.jobs.get(handle)
        if job is None and len(handle) > MAX_HANDLE:
            # gearmand does not answer.
            server.refuse(peer, b"ARGUMENT_TOO_LARGE", b"Job handle too large")
            return
        if job is None and server.durable:
            place = server.keep_place(peer)

            def answer(reply: Reply) -> None:
                numbers = _status_numbers(reply)
                server.fill(place, encode_response(PacketType.STATUS_RES, handle, *numbers))

            server.window.ask(Topic.STATUS, answer, handle=handle)
            return
        if job is None or job.state is PENDING:
            server.send(peer, encode_response(PacketType.STATUS_RES, handle, b"0", b"0", b"0", b"0"))
            return
        running = b"1" if job.state is RUNNING else b"0"
        server.send(
            peer,
            encode_response(
                PacketType.STATUS_RES,
                handle,
                b"1",
                running,
                _as_unsigned(job.numerator),
                _as_unsigned(job.denominator),
            ),
        )

    def _get_status_unique(self, peer: Peer, arguments: list[bytes]) -> None:
        """Of several functions' jobs with the unique, the last created answers, as in gearmand."""
        server = self._server
        unique = until_nul(arguments[0])
        if len(unique) > server.options.max_unique:
            server.refuse(peer, b"ARGUMENT_TOO_LARGE", b"Unique value too large")
            return
        found = [
            function.uniques[unique] for function in server.functions.values() if unique in function.uniques
        ]
        known = [job for job in found if job.state is not PENDING]
        if known:
            job = max(known, key=lambda job: job.serial)
            numbers = [
                b"1",
                b"1" if job.state is RUNNING else b"0",
                _as_unsigned(job.numerator),
                _as_unsigned(job.denominator),
                b"%d" % len(job.listeners or ()),
            ]
        elif not found and server.durable and unique not in (b"", b"-"):
            place = server.keep_place(peer)

            def answer(reply: Reply) -> None:
                told = [*_status_numbers(reply), b"0"]
                server.fill(place, encode_response(PacketType.STATUS_RES_UNIQUE, unique, *told))

            server.window.ask(Topic.UNIQUE, answer, unique=unique)
            return
        else:
            numbers = [b"0"] * 5
        server.send(peer, encode_response(PacketType.STATUS_RES_UNIQUE, unique, *numbers))


def _status_numbers(reply: Reply) -> list[bytes]:
    """Known, running and progress, as both kinds of status tell them."""
    if not isinstance(reply, Standing):
        return [b"0"] * 4
    running = b"1" if reply.running else b"0"
    return [b"1", running, _as_unsigned(reply.numerator), _as_unsigned(reply.denominator)]


def _as_unsigned(number: bytes) -> bytes:
    """A worker's number as STATUS_RES shows it: in 32 bits without sign, as gearmand does."""
    return b"%d" % (atoi(number) % 2**32)
