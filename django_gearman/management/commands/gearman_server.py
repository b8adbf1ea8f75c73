"""`manage.py gearman_server`: the job server, with the database behind it."""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import math
import os
import signal
import socket
import ssl
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import blake2b
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import DatabaseError, connections
from django.utils import timezone

from ... import conf, limiting
from ...durability import durability_problems
from ...exceptions import InvalidSchedule, StoreError
from ...history import History, configured, lanes_of
from ...job_declarations import declared_limits, declared_schedules, scheduled_record
from ...permits import Limit, parse_rate
from ...registry import queue_of, timeout_of
from ...scheduler import Scheduler, refuse_unreadable, synchronise
from ...server.connection import Keepalive, TransportLimits
from ...server.core import JobServer
from ...server.options import FunctionOrder, ServerOptions, Shutdown
from ...server.transport import GearmanServer, bind
from ...store import DatabaseStore
from ...tls import TLSFilesError, server_context
from .. import console, server_options
from ..daemon import (
    RESERVED_DESCRIPTORS,
    Background,
    PidFile,
    allow_core_dumps,
    allow_descriptors,
    check_user,
    switch_user,
)

logger = logging.getLogger(__name__)

PROGRAM: Final = "gearman_server"

_MAX_HOST: Final = 32
"""Characters of the host that stand in a server's own name, and so in every handle."""


class Command(BaseCommand):
    help = "Run a Gearman job server whose background jobs are kept in the database."
    requires_system_checks = "__all__"

    _config_unread = False
    """Whether there is gearmand's configuration file, and nobody said to read one."""

    _logs_apart = False
    """Whether the log goes elsewhere than what the command says."""

    def get_version(self) -> str:
        return server_options.version()

    def create_parser(self, prog_name: str, subcommand: str, **kwargs: Any) -> CommandParser:
        # The beginning of an option's name may be that of another one's; gearmand takes none either.
        # And whoever made a mistake is told of it, not of seventy options.
        usage = "%(prog)s [options] (-h tells which)"
        return super().create_parser(prog_name, subcommand, allow_abbrev=False, usage=usage, **kwargs)

    def add_arguments(self, parser: ArgumentParser) -> None:
        server_options.add_arguments(parser)

    def run_from_argv(self, argv: list[str]) -> None:
        try:
            words = server_options.expand(argv[2:])
        except ValueError as error:
            self._called_from_command_line = True
            self.create_parser(argv[0], argv[1]).error(str(error))
        self._config_unread = words == argv[2:] and Path(server_options.GEARMAND_CONFIG).exists()
        super().run_from_argv([*argv[:2], *words])

    def handle(self, *args: Any, **options: Any) -> None:
        if sys.platform == "win32":
            raise CommandError(
                "gearman_server needs Linux or another POSIX system: run it in a container, or in WSL."
            )
        console.open_standard_files()
        if options["config_file"]:
            raise CommandError("--config-file is for the command line; give the options themselves here.")
        settings = conf.settings_for()
        tls = _tls(options, settings)
        _check_reach(options, tls)
        _check_reach_of_metrics(options)
        if options["user"]:
            check_user(options["user"])
        if options["check_args"]:
            return
        console.close_connections()
        background = Background() if options["daemon"] else None
        with ExitStack() as held:
            limits = _limits(options, settings)
            if options["coredump"]:
                allow_core_dumps()
            sockets = _Sockets.open(options, held)
            pid_file = held.enter_context(PidFile(options["pid_file"])) if options["pid_file"] else None
            if options["user"]:
                # Until here it may have been root's: low ports, the key of TLS, the folder of the pid file.
                switch_user(options["user"])
            self._set_up_log(options)
            _warn_of_descriptors(options, limits)
            port: int = sockets.gearman[0].getsockname()[1]
            name = options["name"] or _default_name(socket.gethostname(), port)
            store = _store(name, options, settings) if options["store"] == "database" else None
            # Silent for so long it may still hand out; then others are about to take its jobs over.
            hold = math.inf if store is None else settings.lease * 2 / 3
            core, replayed = _core(store, name, _shown(sockets.gearman[0]), options, settings)
            server = GearmanServer(
                core,
                store,
                limits,
                tls,
                http_hosts=options["http_host"],
                submit_limit=options["store_timeout"],
                backlog=options["store_backlog"],
                hold=hold,
            )
            addresses = sockets.told(tls=tls is not None)
            kept = "in memory only"
            if store is not None:
                kept = f"in the database {settings.database!r}, {replayed} jobs replayed"

            def greet() -> None:
                if pid_file is not None:
                    pid_file.write()
                self._say(f"{PROGRAM} {name} listens on {addresses}; jobs are kept {kept}.")
                if background is not None:
                    background.detach(keep_stderr=options["log_file"] == "stderr")

            self._run(server, sockets, greet)
            self._say(f"{PROGRAM} stopped.")

    def _run(self, server: GearmanServer, sockets: _Sockets, greet: Callable[[], None]) -> None:
        gc.collect()
        gc.freeze()
        # Jobs and packets make no cycles; looking for some would only cost.
        gc.set_threshold(50_000, 20, 100)
        try:
            with asyncio.Runner(loop_factory=_loop_factory()) as runner:
                runner.run(_serve(server, sockets, greet, has_terminal=not self._logs_apart))
        except StoreError as error:
            if self._logs_apart:
                logger.critical("%s", error)
            raise CommandError(str(error)) from error
        except Exception:
            if self._logs_apart:
                # Nobody may see the traceback.
                logger.critical("The server ends by an error of its own", exc_info=True)
            raise

    def _set_up_log(self, options: dict[str, Any]) -> None:
        file: str | None = options["log_file"]
        syslog: str | None = options["syslog"]
        was_told = console.has_log()
        if options["verbose"] is not None:
            console.set_level(options["verbose"])
        elif file or syslog or not was_told:
            console.set_level(console.VERBOSITY[options["verbosity"]])
        self._logs_apart = file != "stderr" and bool(file or syslog or options["daemon"])
        if syslog:
            console.log_to_syslog(PROGRAM, syslog)
        if file == "stderr":
            console.log_to_stderr()
        elif file == "none":
            console.log_nowhere()
        elif file:
            console.log_to_file(file)
        elif syslog or was_told:
            pass
        elif options["daemon"]:
            self._log_as_daemon()
        else:
            console.log_to_stderr()
        if options["without_effect"]:
            logger.info("Options of gearmand without effect here: %s", ", ".join(options["without_effect"]))
        if self._config_unread:
            logger.info("%s is only read with --config-file", server_options.GEARMAND_CONFIG)

    def _log_as_daemon(self) -> None:
        try:
            console.log_to_syslog(PROGRAM)
        except CommandError as error:
            self.stderr.write(f"No log is kept, since none is named by --log-file. {error}")
            console.log_nowhere()

    def _say(self, line: str) -> None:
        console.say(self.stdout, line)
        if self._logs_apart:
            logger.info("%s", line)


@dataclass(frozen=True)
class _Sockets:
    """What the server listens on; nothing where it is not to speak that."""

    gearman: list[socket.socket]
    http: list[socket.socket]
    metrics: list[socket.socket]

    @classmethod
    def open(cls, options: dict[str, Any], held: ExitStack) -> _Sockets:
        """Bind them; ``held`` closes them."""
        http_port = server_options.http_port(options)
        metrics_port: int | None = options["metrics_port"]
        gearman = _bind(options["listen"], options["port"], held, "--port, or the first of SERVERS,")
        http = [] if http_port is None else _bind(options["http_listen"], http_port, held, "--http-port")
        metrics = (
            []
            if metrics_port is None
            else _bind(options["metrics_listen"], metrics_port, held, "--metrics-port")
        )
        return cls(gearman, http, metrics)

    def told(self, *, tls: bool) -> str:
        """Their addresses, for whoever started the server."""
        addresses = _shown(self.gearman[0]) + (" (TLS)" if tls else "")
        if self.http:
            addresses += f", for HTTP on {_shown(self.http[0])}"
        if self.metrics:
            addresses += f", for metrics on {_shown(self.metrics[0])}"
        return addresses


def _store(name: str, options: dict[str, Any], settings: conf.GearmanSettings) -> DatabaseStore:
    console.require_tables(settings.database)
    return DatabaseStore(
        settings.database,
        name,
        queue_of=queue_of,
        handle_prefix=options["job_handle_prefix"],
        lease=settings.lease,
        scheduler=Scheduler(settings.database, scheduled_record),
        history=History(settings.database, lanes_of(configured(settings))),
        max_workload=settings.max_packet,
    )


def _default_name(host: str, port: int) -> str:
    """
    What a server is called that was given no name; of a long host name a hash stands for what is too much.

    Orchestrators name machines alike but for the end, and two servers of one name end each other.
    """
    if len(host) > _MAX_HOST:
        digest = blake2b(host.encode(errors="replace"), digest_size=4).hexdigest()
        host = f"{host[: _MAX_HOST - len(digest) - 1]}-{digest}"
    return f"{host}:{port}"


def _core(
    store: DatabaseStore | None,
    name: str,
    address: str,
    options: dict[str, Any],
    settings: conf.GearmanSettings,
) -> tuple[JobServer, int]:
    """
    The core, with the lease, and how many jobs it goes on with.

    Those that ran are its own before it listens; the others are claimed beside everything else.
    """
    try:
        # What is not in a database must have handles that no earlier run gave either: tenths of a second.
        epoch = store.take_lease(address) if store else int(time.time() * 10)
        limits = _limits_of_code()
        interrupted = store.resume() if store else []
        replayed = store.count_unfinished() if store else 0
        if store:
            _synchronise(settings)
            limits = store.read_limits()
            _warn_of_database(settings.database, settings.max_packet)
    except StoreError as error:
        raise CommandError(f"The database {settings.database!r} does not work: {error}") from error
    finally:
        # The writer's thread has a connection of its own.
        console.close_connections()
    prefix = options["job_handle_prefix"]
    if prefix is not None:
        # Several servers of a database may have one prefix, but not one lease.
        prefix = f"{prefix}:{store.lease_id}-{epoch}." if store else f"{prefix}:{epoch}."
    core = JobServer(
        ServerOptions(
            name=name,
            epoch=epoch,
            handle_prefix=prefix,
            durable=store is not None,
            record_foreground=settings.record_foreground,
            record_logs=settings.record_logs,
            job_retries=options["job_retries"],
            worker_wakeup=options["worker_wakeup"],
            function_order=FunctionOrder(options["function_order"]),
            zone=timezone.get_default_timezone(),
            exceptions=options["exceptions"],
            timeout_in_seconds=options["timeout_in_seconds"],
            timeout_of=timeout_of,
            allow_shutdown=options["allow_shutdown"],
            measure=options["metrics_port"] is not None,
        )
    )
    # What earlier runs have left goes before what comes now.
    core.window.door_seen = store is None
    core.limits.learn(limits)
    core.returning.adopt(interrupted)
    return core, replayed


async def _serve(
    server: GearmanServer, sockets: _Sockets, ready: Callable[[], None], *, has_terminal: bool
) -> None:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    # As gearmand: serve until no job is left.
    loop.add_signal_handler(signal.SIGUSR1, server.shut_down, Shutdown.GRACEFUL)
    if not has_terminal:
        # As gearmand, for logrotate.
        loop.add_signal_handler(signal.SIGHUP, console.reopen_log_files)
    elif signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        # The terminal is gone; nohup would have had it ignored.
        loop.add_signal_handler(signal.SIGHUP, stopped.set)
    await server.serve(
        sockets.gearman, stopped, http_sockets=sockets.http, metrics_sockets=sockets.metrics, ready=ready
    )


def _limits(options: dict[str, Any], settings: conf.GearmanSettings) -> TransportLimits:
    """What connections may do, within the descriptors that the system gives."""
    wanted: int | None = options["file_descriptors"]
    most = TransportLimits.max_connections
    descriptors = allow_descriptors(wanted, most + RESERVED_DESCRIPTORS)
    room = max(descriptors - RESERVED_DESCRIPTORS, 1)
    keepalive = None
    if options["keepalive"]:
        keepalive = Keepalive(
            idle=options["keepalive_idle"],
            interval=options["keepalive_interval"],
            count=options["keepalive_count"],
        )
    return TransportLimits(
        max_packet=settings.max_packet,
        # Of a few of the largest packets, whatever these are.
        output_total=max(TransportLimits.output_total, 4 * settings.max_packet),
        max_connections=min(most, room) if wanted is None else room,
        backlog=options["backlog"],
        keepalive=keepalive,
    )


def _warn_of_descriptors(options: dict[str, Any], limits: TransportLimits) -> None:
    """Say so where the system, and not who started the server, lets it have few connections."""
    if options["file_descriptors"] is None and limits.max_connections < TransportLimits.max_connections:
        logger.warning(
            "The system lets this process have %d connections, not %d: LimitNOFILE of systemd, "
            "ulimit -Hn of the shell",
            limits.max_connections,
            TransportLimits.max_connections,
        )


def _check_reach(options: dict[str, Any], tls: ssl.SSLContext | None) -> None:
    """Refuse addresses that strangers may reach, unless they are asked for certificates."""
    if options["insecure"]:
        return
    strangers = _first_reachable(options["listen"], options["port"])
    if strangers and (tls is None or tls.verify_mode is not ssl.CERT_REQUIRED):
        raise CommandError(
            f"Whoever reaches {strangers} could submit and take jobs: nobody there is asked for a "
            "certificate. Listen on 127.0.0.1, use --tls-certificate, --tls-key and --tls-ca-file, "
            "or add --insecure if the network is yours alone."
        )
    http_port = server_options.http_port(options)
    strangers = None if http_port is None else _first_reachable(options["http_listen"], http_port)
    if strangers:
        raise CommandError(
            f"Whoever reaches {strangers} could submit jobs over HTTP, which asks nobody who they "
            "are. Take --http-listen 127.0.0.1 with a proxy in front, or add --insecure if the "
            "network is yours alone."
        )


def _check_reach_of_metrics(options: dict[str, Any]) -> None:
    port: int | None = options["metrics_port"]
    strangers = None if port is None else _first_reachable(options["metrics_listen"], port)
    if strangers and not options["insecure"]:
        raise CommandError(
            f"Whoever reaches {strangers} could read which functions there are, and how much they do. Take "
            "--metrics-listen 127.0.0.1, or add --insecure if the network is yours alone."
        )


def _first_reachable(host: str, port: int) -> str | None:
    """The first of a host's addresses that is not of this machine alone; None if all are."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise _cannot_listen(host, port, error) from error
    addresses = [str(address[0]) for *_, address in found]
    return next((each for each in addresses if not ip_address(each.partition("%")[0]).is_loopback), None)


def _bind(host: str, port: int, held: ExitStack, option: str) -> list[socket.socket]:
    try:
        sockets = bind(host, port)
    except (OSError, UnicodeError) as error:
        raise _cannot_listen(host, port, error, option) from error
    for sock in sockets:
        held.callback(sock.close)
    return sockets


def _cannot_listen(host: str, port: int, error: OSError | UnicodeError, option: str = "") -> CommandError:
    # A name that cannot be one is an error of encoding.
    reason = (isinstance(error, OSError) and error.strerror) or str(error)
    hint = ""
    if option and isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        hint = f" Is another server running there? {option} names another port."
    if isinstance(error, OSError) and error.errno == errno.EADDRNOTAVAIL:
        # Such as that of a service in SERVERS.
        hint = " It is none of this machine's addresses: listen on one of those, or on 0.0.0.0, all of them."
    return CommandError(f"Cannot listen on {host}:{port}: {reason}.{hint}")


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop where it is installed (the ``speed`` extra); None for asyncio's own."""
    if os.environ.get("GEARMAN_LOOP") == "asyncio":
        return None
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def _warn_of_database(alias: str, max_packet: int) -> None:
    """What `manage.py check --database` would say of how it keeps commits."""
    for id, problem, hint in durability_problems(connections[alias], max_packet):
        logger.warning("The database %r %s %s (%s)", alias, problem, hint, id)


def _synchronise(settings: conf.GearmanSettings) -> None:
    """Bring the code's schedules and limits into their tables, and see that all of them can be read."""
    try:
        # Where jobs are not looked for, those that are missing may well be there.
        synchronise(settings.database, declared_schedules(), complete=settings.autodiscover)
        limiting.synchronise(settings.database, declared_limits(), complete=settings.autodiscover)
        refuse_unreadable(settings.database)
    except InvalidSchedule as error:
        raise CommandError(f"The schedules do not work: {error}.") from error
    except DatabaseError as error:
        raise StoreError(" ".join(str(error).split())) from error


def _limits_of_code() -> dict[bytes, Limit]:
    """What the code declares: all that there is where nothing is kept."""
    limits = {}
    for function, columns in declared_limits().items():
        count, period = parse_rate(columns["rate"]) if columns["rate"] else (None, 60)
        limits[function.encode()] = Limit(count, float(period), columns["concurrency"], columns["by_key"])
    return limits


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
