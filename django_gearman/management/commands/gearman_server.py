"""`manage.py gearman_server`: the job server, with the database behind it."""

from __future__ import annotations

import asyncio
import gc
import ipaddress
import logging
import math
import os
import signal
import socket
import ssl
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable
from typing import Any

from django.core.management.base import BaseCommand, CommandError
from django.db import connections

from ... import conf
from ...addresses import split_address
from ...checks import durability_problems
from ...exceptions import StoreError
from ...jobs import queue_of
from ...server.core import JobServer, ServerOptions, Shutdown
from ...server.journal import BACKLOG, SUBMIT_LIMIT
from ...server.transport import GearmanServer, TransportLimits, bind
from ...store import DatabaseStore
from ...tls import TLSFilesError, server_context
from ..console import log_to_terminal, require_tables

logger = logging.getLogger(__name__)

MEBIBYTE = 1024 * 1024


class Command(BaseCommand):
    help = "Run a Gearman job server whose background jobs are kept in the database."
    requires_system_checks = "__all__"

    def add_arguments(self, parser: ArgumentParser) -> None:
        host, port = split_address(conf.settings_for().servers[0])
        parser.add_argument(
            "--listen", "-L", default=host, metavar="ADDRESS", help=f"Address to listen on (default: {host})."
        )
        parser.add_argument(
            "--port",
            "-p",
            type=_port,
            default=port,
            help=f"Port (default: {port}); 0 takes a free one.",
        )
        parser.add_argument(
            "--store",
            choices=["database", "memory"],
            default="database",
            help="Where background jobs are kept; memory forgets them at the end (default: database).",
        )
        parser.add_argument(
            "--store-timeout",
            type=_seconds,
            default=SUBMIT_LIMIT,
            metavar="SECONDS",
            help="How long a background submission waits for a database that does not answer before it gets "
            "ERROR (default: %(default)g).",
        )
        parser.add_argument(
            "--store-backlog",
            type=_mebibytes,
            default=BACKLOG,
            metavar="MIB",
            help="How much may wait for the database before background submissions get ERROR at once "
            f"(default: {BACKLOG // MEBIBYTE}).",
        )
        parser.add_argument(
            "--name",
            type=_name,
            help="This server's name, unlike that of any other server on the database "
            "(default: host name and port). A server finds its jobs again by it.",
        )
        parser.add_argument(
            "--job-retries",
            "-j",
            type=_count,
            default=ServerOptions.job_retries,
            metavar="N",
            help="How many workers a job may lose before it is given up; 0 for no limit "
            "(default: %(default)s).",
        )
        parser.add_argument(
            "--timeout-in-seconds",
            action="store_true",
            help="Read the time limits that workers send (CAN_DO_TIMEOUT) as seconds, as Perl's mean them, "
            "and not as milliseconds.",
        )
        parser.add_argument(
            "--exceptions",
            action="store_true",
            help="Send WORK_EXCEPTION to every client, not only to those that ask for it.",
        )
        parser.add_argument(
            "--allow-shutdown",
            action="store_true",
            help="Let whoever connects from this machine end the server with the text command shutdown.",
        )
        parser.add_argument(
            "--insecure",
            action="store_true",
            help="Allow an address that other machines reach, though nobody there shows a certificate.",
        )
        parser.add_argument(
            "--http-port",
            type=_port,
            metavar="PORT",
            help="Take jobs over HTTP too, at this port, in plain text; 0 takes a free one (default: none).",
        )
        parser.add_argument(
            "--http-listen",
            default="127.0.0.1",
            metavar="ADDRESS",
            help="Address of the HTTP port (default: %(default)s).",
        )
        parser.add_argument(
            "--http-host",
            action="append",
            type=_host,
            default=[],
            metavar="NAME",
            help="Name by which HTTP clients may call this server, beside localhost and IP addresses; "
            "may be given more than once.",
        )
        # The second spellings are gearmand's.
        parser.add_argument(
            "--tls",
            "--ssl",
            action="store_true",
            help="Refuse to start without TLS; for nothing else.",
        )
        parser.add_argument(
            "--tls-certificate",
            "--ssl-certificate",
            metavar="FILE",
            help="The server's certificate; with it the port speaks TLS alone (default: TLS_CERTIFICATE).",
        )
        parser.add_argument(
            "--tls-key",
            "--ssl-key",
            metavar="FILE",
            help="The certificate's private key (default: TLS_KEY).",
        )
        parser.add_argument(
            "--tls-ca-file",
            "--ssl-ca-file",
            metavar="FILE",
            help="CAs that sign the certificates of clients and workers (default: TLS_CA).",
        )
        parser.add_argument(
            "--tls-no-client-certificates",
            action="store_true",
            help="Encrypt, but let in whoever comes without a certificate.",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        log_to_terminal(options["verbosity"])
        settings = conf.settings_for()
        tls = _tls(options, settings)
        sockets = self._bind(
            options["listen"],
            options["port"],
            insecure=options["insecure"] or (tls is not None and tls.verify_mode is ssl.CERT_REQUIRED),
        )
        http_sockets: list[socket.socket] = []
        try:
            if options["http_port"] is not None:
                http_sockets = self._bind(
                    options["http_listen"], options["http_port"], insecure=options["insecure"], http=True
                )
            port: int = sockets[0].getsockname()[1]
            name = options["name"] or f"{socket.gethostname()[:32]}:{port}"
            store = None
            if options["store"] == "database":
                require_tables(settings.database)
                store = DatabaseStore(settings.database, name, queue_of=queue_of)
            self._serve(sockets, http_sockets, store, name, options, settings, tls)
        finally:
            for sock in [*sockets, *http_sockets]:
                sock.close()

    def _bind(self, host: str, port: int, *, insecure: bool, http: bool = False) -> list[socket.socket]:
        try:
            sockets = bind(host, port)
        except OSError as error:
            raise CommandError(f"Cannot listen on {host}:{port}: {error.strerror or error}.") from error
        for sock in sockets:
            address = sock.getsockname()[0]
            if not insecure and not ipaddress.ip_address(address.partition("%")[0]).is_loopback:
                for each in sockets:
                    each.close()
                if http:
                    raise CommandError(
                        f"Whoever reaches {address} could submit jobs over HTTP, which asks nobody who they "
                        "are. Take --http-listen 127.0.0.1 with a proxy in front, or add --insecure if the "
                        "network is yours alone."
                    )
                raise CommandError(
                    f"Whoever reaches {address} could submit and take jobs: nobody there is asked for a "
                    "certificate. Listen on 127.0.0.1, use --tls-certificate, --tls-key and --tls-ca-file, "
                    "or add --insecure if the network is yours alone."
                )
        return sockets

    def _serve(
        self,
        sockets: list[socket.socket],
        http_sockets: list[socket.socket],
        store: DatabaseStore | None,
        name: str,
        options: dict[str, Any],
        settings: conf.GearmanSettings,
        tls: ssl.SSLContext | None,
    ) -> None:
        address = _shown(sockets[0])
        try:
            epoch = store.take_lease(address) if store else 0
            replayed = store.replay() if store else []
            if store:
                _warn_of_database(settings.database)
        except StoreError as error:
            raise CommandError(f"The database {settings.database!r} does not work: {error}") from error
        finally:
            # The writer's thread has a connection of its own.
            connections.close_all()
        core = JobServer(
            ServerOptions(
                name=name,
                epoch=epoch,
                durable=store is not None,
                record_foreground=settings.record_foreground,
                job_retries=options["job_retries"],
                exceptions=options["exceptions"],
                timeout_in_seconds=options["timeout_in_seconds"],
                allow_shutdown=options["allow_shutdown"],
            )
        )
        core.adopt(replayed)
        server = GearmanServer(
            core,
            store,
            TransportLimits(max_packet=settings.max_packet),
            tls,
            http_hosts=options["http_host"],
            submit_limit=options["store_timeout"],
            backlog=options["store_backlog"],
        )
        kept = f"in the database {settings.database!r}" if store else "in memory only"
        replays = f", {len(replayed)} jobs replayed" if store else ""
        spoken = " (TLS)" if tls else ""
        if http_sockets:
            spoken += f", for HTTP on {_shown(http_sockets[0])}"
        greeting = f"gearman_server {name} listens on {address}{spoken}; jobs are kept {kept}{replays}."
        del replayed
        gc.collect()
        gc.freeze()
        # Jobs and packets make no cycles; looking for some would only cost.
        gc.set_threshold(50_000, 20, 100)
        try:
            with asyncio.Runner(loop_factory=_loop_factory()) as runner:
                runner.run(self._run(server, sockets, http_sockets, greeting))
        except StoreError as error:
            raise CommandError(str(error)) from error
        self.stdout.write("gearman_server stopped.")

    async def _run(
        self,
        server: GearmanServer,
        sockets: list[socket.socket],
        http_sockets: list[socket.socket],
        greeting: str,
    ) -> None:
        stopped = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopped.set)
        # As gearmand: serve until no job is left.
        loop.add_signal_handler(signal.SIGUSR1, server.shut_down, Shutdown.GRACEFUL)
        await server.serve(sockets, stopped, http_sockets=http_sockets, ready=lambda: self._greet(greeting))

    def _greet(self, greeting: str) -> None:
        self.stdout.write(greeting)
        self.stdout.flush()


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop where it is installed (the ``speed`` extra); None for asyncio's own."""
    if os.environ.get("GEARMAN_LOOP") == "asyncio":
        return None
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def _warn_of_database(alias: str) -> None:
    """What `manage.py check --database` would say of how it keeps commits."""
    for id, problem, hint in durability_problems(connections[alias]):
        logger.warning("The database %r %s %s (%s)", alias, problem, hint, id)


def _tls(options: dict[str, Any], settings: conf.GearmanSettings) -> ssl.SSLContext | None:
    """What the port speaks; None for plain text, which is only spoken when nothing asks for TLS."""
    given = [options["tls_certificate"], options["tls_key"], options["tls_ca_file"]]
    if "" in given:
        raise CommandError("The name of a TLS file is empty.")
    configured = [settings.tls_certificate, settings.tls_key, settings.tls_ca]
    certificate, key, ca = (ours or theirs or None for ours, theirs in zip(given, configured, strict=True))
    open_door: bool = options["tls_no_client_certificates"]
    if not (options["tls"] or open_door or certificate or key or ca):
        return None
    if not certificate or not key:
        raise CommandError(
            "TLS needs a certificate and its key: --tls-certificate and --tls-key, "
            "or TLS_CERTIFICATE and TLS_KEY."
        )
    if not ca and not open_door:
        raise CommandError(
            "TLS needs the CA that signs the certificates of clients and workers: --tls-ca-file, or TLS_CA. "
            "(Or --tls-no-client-certificates, to let in whoever comes.)"
        )
    try:
        return server_context(certificate, key, None if open_door else ca)
    except TLSFilesError as error:
        raise CommandError(f"TLS does not work: {error}.") from error


def _shown(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _port(text: str) -> int:
    try:
        port = int(text)
    except ValueError:
        port = -1
    if not 0 <= port <= 65535:
        raise ArgumentTypeError(f"{text!r} is not a port: use a number from 0 to 65535")
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
    if not text.isdecimal():
        raise ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def _name(text: str) -> str:
    # Stands in every handle, which other implementations keep in 64 bytes.
    if not 0 < len(text) <= 40 or not text.isascii() or not text.isprintable() or " " in text:
        raise ArgumentTypeError(f"{text!r} is not a name: 1 to 40 ASCII characters without spaces")
    return text
