"""
The options of ``gearman_server``: ours, and gearmand's under their own names, long and short.

Whatever a service file or a configuration file for gearmand says is understood:
done here, or accepted without effect, or refused in a sentence that says what to
do. docs/gearmand.md has the table. PROTOCOL: "gearmand options".
"""

from __future__ import annotations

import math
import re
import shlex
import socket
from argparse import SUPPRESS, Action, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import django

from .. import __version__, conf
from ..addresses import split_address
from ..server.connection import TransportLimits
from ..server.journal import BACKLOG, SUBMIT_LIMIT
from ..server.options import FunctionOrder, ServerOptions
from .console import SYSLOG, VERBOSE
from .daemon import RESERVED_DESCRIPTORS

GEARMAND_CONFIG: Final = "/etc/gearmand.conf"
"""Where gearmand looks by itself; we do not, since a site's server is not the machine's."""

_HTTP_PORT: Final = 8080

MEBIBYTE: Final = 1024 * 1024

_OTHER_QUEUES: Final = {
    "libsqlite3",
    "libsqlite",
    "mysql",
    "libdrizzle",
    "libpq",
    "postgres",
    "redis",
    "libmemcached",
    "libtokyocabinet",
    "tokyocabinet",
}
"""gearmand's queues, of all its versions, that are no database of Django's."""

_OF_OTHER_QUEUES: Final = {
    "libsqlite3": ("db", "table"),
    "mysql": ("host", "port", "user", "password", "db", "table"),
    "libpq": ("conninfo", "table"),
    "redis": ("server", "port", "password", "prefix"),
    "libmemcached": ("servers", "prefix"),
    "libdrizzle": ("host", "port", "uds", "user", "password", "db", "table"),
    "libtokyocabinet": ("file",),
}
"""{gearmand's queue: the options about it, without its name}"""


def add_arguments(parser: ArgumentParser) -> None:
    """Add every option but Django's own."""
    _add_network(parser)
    _add_jobs(parser)
    _add_process(parser)
    _add_log(parser)
    _add_http(parser)
    _add_metrics(parser)
    _add_tls(parser)
    _add_without_effect(parser)


def _add_network(parser: ArgumentParser) -> None:
    host, port = split_address(conf.settings_for().servers[0])
    group = parser.add_argument_group("connections")
    group.add_argument(
        "--listen", "-L", default=host, metavar="ADDRESS", help=f"Address to listen on (default: {host})."
    )
    group.add_argument(
        "--port",
        "-p",
        type=_port,
        default=port,
        help=f"Port, as a number or as a service's name (default: {port}); 0 takes a free one.",
    )
    group.add_argument(
        "--insecure",
        action="store_true",
        help="Allow an address that other machines reach, though nobody there shows a certificate.",
    )
    group.add_argument(
        "--backlog",
        "-b",
        type=_count,
        default=TransportLimits.backlog,
        metavar="N",
        help="Connections that may wait to be taken (default: %(default)s; the system may set less).",
    )
    group.add_argument(
        "--file-descriptors",
        "-f",
        type=_descriptors,
        metavar="N",
        help=f"Files and connections that may be open; connections are {RESERVED_DESCRIPTORS} fewer "
        f"(default: enough for {TransportLimits.max_connections} connections, as far as the system permits).",
    )
    group.add_argument(
        "--keepalive",
        action="store_true",
        help="Notice by TCP keepalive when the machine of a silent client or worker is gone.",
    )
    for name, unit in (
        ("idle", "Seconds of silence before the first probe"),
        ("interval", "Seconds between two probes"),
        ("count", "Probes without answer that end a connection"),
    ):
        group.add_argument(
            f"--keepalive-{name}",
            type=_probes if name == "count" else _probe_seconds,
            metavar="N",
            help=f"{unit}, with --keepalive (default: -1, the system's own).",
        )


def _add_jobs(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("jobs")
    group.add_argument(
        "--store",
        choices=["database", "memory"],
        default="database",
        help="Where background jobs are kept; memory forgets them at the end (default: database).",
    )
    group.add_argument(
        "--queue-type",
        "-q",
        dest="store",
        type=_queue_type,
        metavar="QUEUE",
        help="gearmand's name for --store: builtin is memory.",
    )
    group.add_argument(
        "--store-timeout",
        type=_seconds,
        default=SUBMIT_LIMIT,
        metavar="SECONDS",
        help="How long a background submission waits for a database that does not answer before it gets "
        "ERROR (default: %(default)g).",
    )
    group.add_argument(
        "--store-backlog",
        type=_mebibytes,
        default=BACKLOG,
        metavar="MIB",
        help="How much may wait for the database before background submissions get ERROR at once "
        f"(default: {BACKLOG // MEBIBYTE}).",
    )
    group.add_argument(
        "--name",
        type=_name,
        help="This server's name, unlike that of any other server on the database "
        "(default: host name and port). A server finds its jobs again by it.",
    )
    group.add_argument(
        "--job-handle-prefix",
        type=_handle_prefix,
        metavar="PREFIX",
        help="What handles begin with, instead of H: and the name.",
    )
    group.add_argument(
        "--job-retries",
        "-j",
        type=_count,
        default=conf.settings_for().job_retries,
        metavar="N",
        help="How many workers a job may lose before it is given up; 0 for no limit (default: %(default)s).",
    )
    group.add_argument(
        "--worker-wakeup",
        "-w",
        type=_count,
        default=ServerOptions.worker_wakeup,
        metavar="N",
        help="How many sleeping workers to wake for a job; 0 for all (default: %(default)s).",
    )
    group.add_argument(
        "--function-order",
        choices=[order.value for order in FunctionOrder],
        default=ServerOptions.function_order.value,
        help="Which of a worker's functions gives it the next job: that with the highest priority, and then "
        "in turn; or as gearmand 1.1 does without, and with --round-robin (default: %(default)s).",
    )
    group.add_argument(
        "--round-robin",
        "-R",
        dest="function_order",
        action="store_const",
        const=FunctionOrder.ROUND_ROBIN.value,
        help="gearmand's name for --function-order round-robin.",
    )
    group.add_argument(
        "--timeout-in-seconds",
        action="store_true",
        help="Read the time limits that workers send (CAN_DO_TIMEOUT) as seconds, as Perl's mean them, "
        "and not as milliseconds.",
    )
    group.add_argument(
        "--exceptions",
        action="store_true",
        help="Send WORK_EXCEPTION to every client, not only to those that ask for it.",
    )
    group.add_argument(
        "--allow-shutdown",
        action="store_true",
        help="Let whoever connects from this machine end the server with the text command shutdown.",
    )


def _add_process(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("process")
    group.add_argument(
        "--daemon", "-d", action="store_true", help="Go to the background once connections are taken."
    )
    group.add_argument(
        "--pid-file",
        "-P",
        type=_path,
        metavar="FILE",
        help="File for the process's number, while it serves; no two servers can hold one.",
    )
    group.add_argument(
        "--user", "-u", metavar="NAME", help="User to become once the ports are bound; root may say so."
    )
    group.add_argument(
        "--coredump", action="store_true", help="Keep the memory of a process that crashes in a file."
    )
    group.add_argument(
        "--config-file",
        metavar="FILE",
        help="Options, one to a line, which those of the command line override; @FILE means the same.",
    )
    group.add_argument(
        "--check-args", action="store_true", help="Look whether the options are right, and do nothing else."
    )
    group.add_argument("-V", action="version", version=version(), help="As --version.")


def _add_log(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("log")
    group.add_argument(
        "--log-file",
        "-l",
        type=_path,
        metavar="FILE",
        help="File for log lines, or stderr, or none (default: where LOGGING says, else stderr; "
        "with --daemon syslog).",
    )
    group.add_argument(
        "--syslog",
        nargs="?",
        const=SYSLOG,
        metavar="ADDRESS",
        help=f"Log to syslog, at a socket or at host:port (default: {SYSLOG}).",
    )
    group.add_argument(
        "--verbose",
        type=_level,
        metavar="LEVEL",
        help=f"What to log: {', '.join(VERBOSE)} (default: as --verbosity says).",
    )


def _add_http(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("HTTP")
    group.add_argument(
        "--protocol",
        "-r",
        type=_protocol,
        metavar="NAME",
        help=f"http: take jobs over HTTP at port {_HTTP_PORT}, or at --http-port.",
    )
    group.add_argument(
        "--http-port",
        type=_port,
        metavar="PORT",
        help="Take jobs over HTTP too, at this port, in plain text; 0 takes a free one (default: none).",
    )
    group.add_argument(
        "--http-listen",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="Address of the HTTP port (default: %(default)s).",
    )
    group.add_argument(
        "--http-host",
        action="append",
        type=_host,
        default=[],
        metavar="NAME",
        help="Name by which HTTP clients may call this server, beside localhost and IP addresses; "
        "may be given more than once.",
    )


def _add_metrics(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("metrics")
    group.add_argument(
        "--metrics-port",
        type=_port,
        metavar="PORT",
        help="Tell Prometheus how it goes, at /metrics of this port; 0 takes a free one (default: none).",
    )
    group.add_argument(
        "--metrics-listen",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="Address of the port of the metrics (default: %(default)s).",
    )


def _add_tls(parser: ArgumentParser) -> None:
    # The second spellings are gearmand's.
    group = parser.add_argument_group("TLS")
    group.add_argument(
        "--tls", "--ssl", action="store_true", help="Refuse to start without TLS; for nothing else."
    )
    group.add_argument(
        "--tls-certificate",
        "--ssl-certificate",
        metavar="FILE",
        help="The server's certificate; with it the port speaks TLS alone (default: TLS_CERTIFICATE).",
    )
    group.add_argument(
        "--tls-key",
        "--ssl-key",
        metavar="FILE",
        help="The certificate's private key (default: TLS_KEY).",
    )
    group.add_argument(
        "--tls-ca-file",
        "--ssl-ca-file",
        metavar="FILE",
        help="CAs that sign the certificates of clients and workers (default: TLS_CA).",
    )
    group.add_argument(
        "--tls-no-client-certificates",
        action="store_true",
        help="Encrypt, but let in whoever comes without a certificate.",
    )


def _add_without_effect(parser: ArgumentParser) -> None:
    group = parser.add_argument_group(
        "of gearmand, without effect",
        "Accepted, so that its service and configuration files can stay as they are; so are the options of "
        "its queues: " + ", ".join(f"--{queue}-..." for queue in _OF_OTHER_QUEUES),
    )
    parser.set_defaults(without_effect=[])

    def accept(*names: str, **keywords: Any) -> None:
        group.add_argument(*names, action=_WithoutEffect, dest="without_effect", **keywords)

    accept("--threads", "-t", type=_count, metavar="N", help="One event loop serves all connections.")
    accept("--hashtable-buckets", type=_count, metavar="N", help="The tables grow by themselves.")
    accept(
        "--store-queue-on-shutdown",
        nargs=0,
        help="Background jobs are in the database before they are acknowledged.",
    )
    for queue, names in _OF_OTHER_QUEUES.items():
        for name in names:
            accept(f"--{queue}-{name}")
    accept("--libdrizzle-mysql", nargs=0)
    accept("--libtokyocabinet-optimize", nargs=0)


class _WithoutEffect(Action):
    """Note that the option was given."""

    def __init__(
        self, option_strings: Sequence[str], dest: str, help: str | None = None, **rest: Any
    ) -> None:
        # Those of other queues are not worth a line each.
        super().__init__(option_strings, dest, help=help or SUPPRESS, **rest)

    def __call__(
        self, parser: ArgumentParser, namespace: Namespace, values: object, option_string: str | None = None
    ) -> None:
        namespace.without_effect = [*namespace.without_effect, option_string]


def version() -> str:
    return f"gearman_server (django-gearman) {__version__}, Django {django.get_version()}"


def http_port(options: dict[str, Any]) -> int | None:
    """The port of HTTP; None when it is not wanted."""
    port: int | None = options["http_port"]
    if port is None and options["protocol"] is not None:
        return _HTTP_PORT
    return port


# Configuration files.


def expand(words: Sequence[str]) -> list[str]:
    """
    Words of the command line, with those of its configuration files before them.

    What comes last counts, so the command line overrides the files.

    Raises:
        ValueError: A file cannot be read; the sentence names it.
    """
    from_files: list[str] = []
    rest: list[str] = []
    remaining = iter(words)
    for word in remaining:
        name, is_assigned, file = word.partition("=")
        if name == "--config-file":
            file = file if is_assigned else next(remaining, "")
            if not file:
                raise ValueError("argument --config-file: expected a file's name")
            from_files += _read(file)
        elif len(word) > 1 and word.startswith("@"):
            from_files += _read(word[1:])
        else:
            rest.append(word)
    return from_files + rest


def _read(file: str) -> list[str]:
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ValueError(f"Cannot read the configuration file {file}: {reason}") from error
    words: list[str] = []
    for number, line in enumerate(lines, 1):
        try:
            words += words_of(line)
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: {error}") from error
    return words


_SETTING: Final = re.compile(r"([A-Za-z][\w-]*)\s*(?:=|\s|$)\s*(.*)")
"""``port = 4730``, ``port 4730`` or ``daemon``"""


def words_of(line: str) -> list[str]:
    """
    What a line of a configuration file means on the command line.

    Options with their dashes, as gearmand wants them, several to a line; or one
    without, with ``=`` or a space before its value. Quotes hold values together,
    and ``#`` begins a comment.

    Raises:
        ValueError: It is neither.
    """
    try:
        words = shlex.split(line, comments=True)
    except ValueError as error:
        raise ValueError(f"a quotation mark is missing in {line.strip()!r}") from error
    if words and not words[0].startswith("-"):
        setting = _SETTING.fullmatch(line.strip())
        if setting is None:
            raise ValueError(f"{line.strip()!r} is no option, such as port=4730")
        name, value = setting.groups()
        values = " ".join(shlex.split(value, comments=True))
        words = [f"--{name}={values}" if values else f"--{name}"]
    if any(word.partition("=")[0] == "--config-file" for word in words):
        raise ValueError("a configuration file cannot name another one")
    return words


# Values.


def _port(text: str) -> int:
    try:
        port = int(text) if text.isdecimal() else socket.getservbyname(text, "tcp")
    except (OSError, ValueError):
        port = -1
    if not 0 <= port <= 65535:
        raise ArgumentTypeError(
            f"{text!r} is not a port: use a number from 0 to 65535, or the name of a service that this "
            "machine knows"
        )
    return port


def _host(text: str) -> str:
    if not text.isascii() or not text.isprintable() or not text or set(text) & set(" :/@[]"):
        raise ArgumentTypeError(f"{text!r} is not a host's name: give it without port, in ASCII")
    return text


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ArgumentTypeError(f"{text!r} is not a time: use a number of seconds above 0")
    return seconds


def _mebibytes(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or not int(text):
        raise ArgumentTypeError(f"{text!r} is not a size: use a whole number of MiB from 1")
    return int(text) * MEBIBYTE


def _count(text: str) -> int:
    # No more than a C program takes: more digits would be a mistake.
    if not text.isdecimal() or int(text) >= 2**31:
        raise ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2147483647")
    return int(text)


def _descriptors(text: str) -> int:
    least = RESERVED_DESCRIPTORS * 2
    if not text.isdecimal() or not least <= int(text) < 2**31:
        raise ArgumentTypeError(f"{text!r} is not a number of descriptors: use {least} or more")
    return int(text)


def _in_range(highest: int) -> Callable[[str], int | None]:
    def read(text: str) -> int | None:
        if text == "-1":
            return None
        if not text.isdecimal() or not 1 <= int(text) <= highest:
            raise ArgumentTypeError(
                f"{text!r} is neither a whole number from 1 to {highest} nor -1, the system's own"
            )
        return int(text)

    return read


# The kernel's own limits.
_probe_seconds = _in_range(32767)
_probes = _in_range(127)


def _name(text: str) -> str:
    # Stands in every handle, which other implementations keep in 64 bytes.
    if not 0 < len(text) <= 40 or not text.isascii() or not text.isprintable() or " " in text:
        raise ArgumentTypeError(f"{text!r} is not a name: 1 to 40 ASCII characters without spaces")
    return text


def _handle_prefix(text: str) -> str:
    # Leaves room for the numbers, see _name.
    if not 0 < len(text) <= 32 or not text.isascii() or not text.isprintable() or " " in text:
        raise ArgumentTypeError(f"{text!r} is not a prefix: 1 to 32 ASCII characters without spaces")
    return text


def _path(text: str) -> str:
    if not text or "\0" in text:
        raise ArgumentTypeError(f"{text!r} is not the name of a file")
    return text


def _queue_type(text: str) -> str:
    if text == "builtin":
        return "memory"
    if text.lower() in _OTHER_QUEUES:
        raise ArgumentTypeError(
            f"{text!r} is a queue of gearmand alone: take --store database, which keeps background jobs in "
            "the database of DATABASES, and let gearmand work off its own queue"
        )
    raise ArgumentTypeError(f"{text!r} is not a queue: use builtin, or --store database")


def _protocol(text: str) -> str:
    if text != "http":
        raise ArgumentTypeError(f"{text!r} is not a protocol that is spoken here: there is http")
    return text


def _level(text: str) -> int:
    try:
        return VERBOSE[text.upper()]
    except KeyError:
        raise ArgumentTypeError(f"{text!r} is not a level: use {', '.join(VERBOSE)}") from None
