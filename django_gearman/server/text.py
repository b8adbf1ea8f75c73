"""
The administrative protocol, told from the core.

Lines of words in, lines of text out; the replies are gearmand's to the byte.
PROTOCOL: "Administrative Protocol".
"""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import quote_plus

from .. import __version__
from .core import JobServer

MAX_WORDS = 5
"""gearmand closes a connection whose line has more; so do we, see ``answer``."""


def answer(server: JobServer, line: bytes) -> bytes | None:
    """The reply to one line, without its line end; None when the connection is to be closed."""
    words = [word for word in line.split(b" ") if word]
    if len(words) > MAX_WORDS:
        return None
    # A leading space makes an unknown command, as in gearmand.
    command = b"" if not words or line.startswith(b" ") else words[0]
    handler = _COMMANDS.get(command.lower())
    if handler is None:
        shown = quote_plus(command).encode()
        return b"ERR UNKNOWN_COMMAND Unknown+server+command" + shown + b"\r\n"
    return handler(server)


def _status(server: JobServer) -> bytes:
    rows = [
        b"%s\t%d\t%d\t%d\n" % (function.name, function.total, function.running, len(function.workers))
        for function in server.functions.values()
    ]
    return b"".join(rows) + b".\n"


def _workers(server: JobServer) -> bytes:
    rows = []
    for peer in server.peers:
        # The last registered comes first, as gearmand lists them.
        functions = b"".join(b" " + name for name in reversed(peer.abilities))
        rows.append(b"%d %s %s :%s\n" % (peer.number, peer.address.encode(), peer.client_id, functions))
    return b"".join(rows) + b".\n"


def _version(server: JobServer) -> bytes:
    return b"OK " + __version__.encode() + b"\n"


_COMMANDS: dict[bytes, Callable[[JobServer], bytes]] = {
    b"status": _status,
    b"workers": _workers,
    b"version": _version,
}
