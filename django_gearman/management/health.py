"""
Whether job servers answer, and whether somebody serves what is to be served.

Asks the servers alone, so a worker that is busy is as healthy as one that
sleeps. Knows no Django: ``python -m django_gearman.health`` does not boot it.
"""

from __future__ import annotations

import socket
import ssl
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final

from ..addresses import DEFAULT_PORT
from ..client.admin_client import AdminClient
from ..exceptions import GearmanError
from ..tls import TLSFilesError, client_context
from .terminal import printable, sentence, server_list

TIMEOUT: Final = 3.0
"""Seconds for the connection, and for each answer."""

AT_ONCE: Final = 16
"""Servers asked at a time."""


class Unhealthy(Exception):
    """Something is not as it should be; the text is a sentence that says what."""


class _Standing:
    """What one server said: who serves which function."""

    def __init__(self, server: str) -> None:
        self.server = server
        self.error = ""
        self.version = ""
        self.workers: dict[str, int] = {}
        """{function: connections that offer it}"""
        self.here = 0
        """Workers of this machine."""


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options that the command and the module share."""
    parser.add_argument(
        "functions", nargs="*", metavar="FUNCTION", help="Functions that a worker must serve (default: none)."
    )
    parser.add_argument(
        "--here",
        action="store_true",
        help="A worker of this machine must be connected, as its host name in the worker's id tells.",
    )
    parser.add_argument(
        "--any", action="store_true", help="One of the servers that answers is enough (default: all must)."
    )
    parser.add_argument(
        "--timeout",
        type=_seconds,
        default=TIMEOUT,
        metavar="SECONDS",
        help="How long to wait for a connection, and for each answer (default: %(default)g).",
    )
    parser.add_argument("--quiet", "-q", action="store_true", help="Say nothing when all is well.")


def look(
    servers: Sequence[str], functions: Collection[str], options: dict[str, Any], tls: ssl.SSLContext | None
) -> str:
    """
    A sentence that says how well all is.

    Raises:
        Unhealthy: Something is not.
    """
    ask = partial(_ask, here=options["here"], timeout=options["timeout"], tls=tls)
    with ThreadPoolExecutor(min(len(servers), AT_ONCE)) as pool:
        found = list(pool.map(ask, servers))
    silent = [standing.error for standing in found if standing.error]
    answering = [standing for standing in found if not standing.error]
    if silent and not (options["any"] and answering):
        raise Unhealthy(" ".join(silent))
    idle = [name for name in functions if not any(standing.workers.get(name) for standing in answering)]
    if idle:
        raise Unhealthy(
            f"No worker serves {printable(', '.join(idle))}: is `manage.py gearman_worker` running?"
        )
    if options["here"] and not any(standing.here for standing in answering):
        raise Unhealthy(
            f"No worker of {socket.gethostname()} is connected: is `manage.py gearman_worker` running here?"
        )
    told = ", ".join(f"{standing.server} answers ({standing.version})" for standing in answering)
    if functions:
        told += "; workers serve " + ", ".join(functions)
    if options["here"]:
        told += f"; workers of {socket.gethostname()} are connected"
    return printable(f"{told}.")


def _ask(server: str, *, here: bool, timeout: float, tls: ssl.SSLContext | None) -> _Standing:
    standing = _Standing(server)
    try:
        with AdminClient(server, connect_timeout=timeout, timeout=timeout, tls=tls) as admin:
            standing.version = admin.version()
            standing.workers = {status.name: status.workers for status in admin.status()}
            if here:
                ours = f"{socket.gethostname()}:"
                standing.here = sum(
                    worker.client_id.startswith(ours) and bool(worker.functions) for worker in admin.workers()
                )
    except GearmanError as error:
        standing.error = sentence(error)
    return standing


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m django_gearman.health``; exits with 0 when all is well, 1 when not, 2 for wrong options."""
    parser = ArgumentParser(
        "python -m django_gearman.health",
        description="Say whether job servers answer, and whether workers serve functions. Exit status 0: all "
        "is well; 1: it is not; 2: the options are wrong.",
        allow_abbrev=False,
    )
    add_arguments(parser)
    parser.add_argument(
        "--servers",
        type=server_list,
        default=(f"127.0.0.1:{DEFAULT_PORT}",),
        metavar="HOST:PORT,...",
        help=f"Job servers to ask (default: 127.0.0.1:{DEFAULT_PORT}).",
    )
    parser.add_argument("--tls-ca", metavar="FILE", help="As TLS_CA of the settings; turns TLS on.")
    parser.add_argument("--tls-certificate", metavar="FILE", help="As TLS_CERTIFICATE.")
    parser.add_argument("--tls-key", metavar="FILE", help="As TLS_KEY.")
    options = vars(parser.parse_args(arguments))
    if not options["tls_ca"] and (options["tls_certificate"] or options["tls_key"]):
        parser.error("--tls-certificate and --tls-key need --tls-ca, by which to know the server")
    tls = None
    try:
        if options["tls_ca"]:
            tls = client_context(options["tls_ca"], options["tls_certificate"], options["tls_key"])
        told = look(options["servers"], options["functions"], options, tls)
    except TLSFilesError as error:
        parser.exit(1, f"TLS does not work: {error}.\n")
    except Unhealthy as error:
        parser.exit(1, f"{error}\n")
    if not options["quiet"]:
        print(told)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < 1e6:
        raise ArgumentTypeError(f"{text!r} is not a time: use a number of seconds above 0")
    return seconds
