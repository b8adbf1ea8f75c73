"""What the commands that come and go share: lists of servers, text of others to be shown, how they end."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, ArgumentTypeError
from typing import Final, NoReturn

from ..addresses import split_address

INTERRUPTED: Final = 130
"""Exit status after Ctrl-C, as of programs that die of it."""

BROKEN_PIPE: Final = 141
"""Exit status when nobody reads the output any more, as of programs that die of it."""


def server_list(text: str) -> tuple[str, ...]:
    """``host:port,...`` of an option, with its error as ``argparse`` shows it."""
    servers = tuple(server.strip() for server in text.split(","))
    try:
        for server in servers:
            split_address(server)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from error
    return servers


def add_servers(parser: ArgumentParser, what: str) -> None:
    """The option ``--servers``; ``what`` says what they are for."""
    parser.add_argument(
        "--servers",
        type=server_list,
        metavar="HOST:PORT,...",
        help=f"{what} (default: those of the settings).",
    )


def printable(text: str) -> str:
    """A text of somebody else, in which nothing steers the terminal: only line ends and tabs stay."""
    return "".join(
        character
        if character.isprintable() or character in "\n\t"
        else character.encode("unicode_escape", "surrogatepass").decode()
        for character in text
    )


def sentence(error: Exception) -> str:
    """What an error says, as a sentence of its own, fit for the terminal."""
    text = printable(str(error))
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "?")) else f"{text}."


def end_of_reader() -> NoReturn:
    """Nobody reads standard output any more: end in silence."""
    # The interpreter would complain once more, when it flushes at its end.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
    sys.exit(BROKEN_PIPE)
