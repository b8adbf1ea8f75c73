"""
Which functions are listed, and which workers offer them.

A function is listed from the first time that anybody names it, and stays so
without workers and jobs, though not without limit. What waits under its name
is in ``jobs.Function``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from typing import TYPE_CHECKING, Final

from ..protocol.packets import CLAIM, PacketType, atoi
from .jobs import Function

if TYPE_CHECKING:
    from .core import JobServer
    from .peers import Handler, Peer

SECOND: Final = 1000
"""Milliseconds; gearmand takes no shorter time limit."""


class Abilities:
    """The functions of one server, and CAN_DO and its like."""

    def __init__(self, server: JobServer) -> None:
        self._server = server
        self._idle: OrderedDict[Function, None] = OrderedDict()
        """Functions that were without workers and jobs when last looked at, longest first."""

    def handlers(self) -> dict[PacketType, Handler]:
        """What to do with each of the packets."""
        return {
            PacketType.CAN_DO: self._can_do,
            PacketType.CAN_DO_TIMEOUT: self._can_do_timeout,
            PacketType.CANT_DO: self._cant_do,
            PacketType.RESET_ABILITIES: self._reset_abilities,
            PacketType.ALL_YOURS: self._all_yours,
        }

    # Packets of workers.

    def _can_do(self, peer: Peer, arguments: list[bytes]) -> None:
        self._offer(peer, arguments[0])
        if peer.timeouts is not None:
            peer.timeouts.pop(arguments[0], None)

    def _can_do_timeout(self, peer: Peer, arguments: list[bytes]) -> None:
        """A time limit of milliseconds; below a second is a second, none is none. gearmand since 1.1.19."""
        name, limit = arguments
        self._offer(peer, name)
        if name in peer.abilities:
            amount = atoi(limit) * (SECOND if self._server.options.timeout_in_seconds else 1)
            if peer.timeouts is None:
                peer.timeouts = {}
            if amount > 0:
                peer.timeouts[name] = max(amount, SECOND) / SECOND
            else:
                peer.timeouts.pop(name, None)

    def _all_yours(self, peer: Peer, arguments: list[bytes]) -> None:
        """The worker has no other server; nothing depends on it. Not in gearmand."""

    def _offer(self, peer: Peer, name: bytes) -> None:
        if name in peer.abilities:
            return
        if len(peer.abilities) >= self._server.options.max_abilities:
            self._server.refuse(peer, b"ARGUMENT_TOO_LARGE", b"Too many functions on one connection")
            return
        function = self.function(peer, name)
        if function is not None:
            peer.abilities[name] = function
            function.workers[peer] = None
            if peer.enlisted:
                function.sleepers[peer] = None

    def _cant_do(self, peer: Peer, arguments: list[bytes]) -> None:
        function = peer.abilities.get(arguments[0])
        if function is not None:
            self._withdraw(peer, {function})

    def _reset_abilities(self, peer: Peer, arguments: list[bytes]) -> None:
        self._withdraw(peer, set(peer.abilities.values()))

    def _withdraw(self, peer: Peer, functions: Collection[Function]) -> None:
        # As in gearmand, who no longer offers a function gives back its jobs.
        for function in functions:
            self.forget(peer, function)
        for job in reversed(list(peer.running.values())):
            if job.function in functions:
                self._server.lose_worker(job)
        if peer.woken_for in functions:
            self._server.pass_on_wake(peer, None)

    def forget(self, peer: Peer, function: Function) -> None:
        """A worker offers it no more."""
        del peer.abilities[function.name]
        del function.workers[peer]
        if peer.timeouts is not None:
            peer.timeouts.pop(function.name, None)
        function.sleepers.pop(peer, None)
        self.note_if_idle(function)

    # The list.

    def function(self, peer: Peer, name: bytes) -> Function | None:
        """The function of that name, made when it is new; None when it is refused."""
        function = self._server.functions.get(name)
        if function is not None:
            return function
        refusal = self._refusal_of(name)
        if refusal is not None:
            self._server.refuse(peer, *refusal)
            return None
        return self.add(name)

    def _refusal_of(self, name: bytes) -> tuple[bytes, bytes] | None:
        """Code and text of the error about a new function's name; None when it may be made."""
        if len(name) > self._server.options.max_function:
            return b"ARGUMENT_TOO_LARGE", b"Function name too large"
        if name == CLAIM or not is_printable(name):
            # A line end or a tab would forge a row of the listings.
            return b"INVALID_FUNCTION_NAME", b"Function names are UTF-8 without control characters"
        return None

    def add(self, name: bytes) -> Function:
        """List a function that is not listed."""
        function = self._server.functions[name] = Function(name)
        self._server.limits.attach(function)
        self.note_if_idle(function)
        return function

    def note_if_idle(self, function: Function) -> None:
        """
        Functions without workers and jobs stay listed, but not without limit.

        gearmand keeps each for ever and grows under names that are made up.
        """
        if not function.idle:
            return
        idle = self._idle
        idle[function] = None
        if len(idle) > self._server.options.max_idle_functions:
            oldest, _ = idle.popitem(last=False)
            if oldest is not function and oldest.idle:
                del self._server.functions[oldest.name]

    # What an operator says.

    def create(self, name: bytes) -> tuple[bytes, bytes] | None:
        """List a function before anybody uses it; code and text of the error when the name is refused."""
        if name in self._server.functions:
            return None
        refusal = self._refusal_of(name)
        if refusal is None:
            self.add(name)
        return refusal

    def drop(self, name: bytes) -> bool:
        """
        Forget a function that is listed; False when it has workers or jobs.

        gearmand drops it with its waiting jobs, which then nobody can run.

        Raises:
            KeyError: There is none of that name.
        """
        function = self._server.functions[name]
        if function.held or function.workers or function.away:
            return False
        del self._server.functions[name]
        self._idle.pop(function, None)
        return True

    def limit(self, name: bytes, high: int, normal: int, low: int) -> None:
        """
        Let the function hold so many jobs, of any kind, before one of each priority is refused.

        0 is no limit. Nothing happens, as in gearmand, when the function is not listed.
        """
        function = self._server.functions.get(name)
        if function is not None:
            function.limits = (high, normal, low) if high or normal or low else None
            self.note_if_idle(function)


def is_printable(name: bytes) -> bool:
    """Whether it is UTF-8 without control characters, which would forge rows of a listing."""
    try:
        text = name.decode()
    except UnicodeDecodeError:
        return False
    return not any(character < " " or "\x7f" <= character < "\xa0" for character in text)
