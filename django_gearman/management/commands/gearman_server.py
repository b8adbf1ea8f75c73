"""`manage.py gearman_server`: the job server, with the database behind it."""

from __future__ import annotations

import asyncio
import gc
import ipaddress
import os
import signal
import socket
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable
from typing import Any

from django.core.management.base import BaseCommand, CommandError
from django.db import connections

from ... import conf
from ...addresses import split_address
from ...exceptions import StoreError
from ...jobs import queue_of
from ...server.core import JobServer, ServerOptions
from ...server.transport import GearmanServer, TransportLimits, bind
from ...store import DatabaseStore
from ..console import log_to_terminal, require_tables


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
            "--exceptions",
            action="store_true",
            help="Send WORK_EXCEPTION to every client, not only to those that ask for it.",
        )
        parser.add_argument(
            "--insecure",
            action="store_true",
            help="Allow an address that other machines reach, though nothing there is checked or encrypted.",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        log_to_terminal(options["verbosity"])
        settings = conf.settings_for()
        sockets = self._bind(options["listen"], options["port"], insecure=options["insecure"])
        try:
            port: int = sockets[0].getsockname()[1]
            name = options["name"] or f"{socket.gethostname()[:32]}:{port}"
            store = None
            if options["store"] == "database":
                require_tables(settings.database)
                store = DatabaseStore(settings.database, name, queue_of=queue_of)
            self._serve(sockets, store, name, options, settings)
        finally:
            for sock in sockets:
                sock.close()

    def _bind(self, host: str, port: int, *, insecure: bool) -> list[socket.socket]:
        try:
            sockets = bind(host, port)
        except OSError as error:
            raise CommandError(f"Cannot listen on {host}:{port}: {error.strerror or error}.") from error
        for sock in sockets:
            address = sock.getsockname()[0]
            if not insecure and not ipaddress.ip_address(address.partition("%")[0]).is_loopback:
                for each in sockets:
                    each.close()
                raise CommandError(
                    f"Whoever reaches {address} could submit and take jobs: nothing there is checked "
                    "or encrypted. Listen on 127.0.0.1, or add --insecure if the network is yours alone."
                )
        return sockets

    def _serve(
        self,
        sockets: list[socket.socket],
        store: DatabaseStore | None,
        name: str,
        options: dict[str, Any],
        settings: conf.GearmanSettings,
    ) -> None:
        address = _shown(sockets[0])
        try:
            epoch = store.take_lease(address) if store else 0
            replayed = store.replay() if store else []
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
            )
        )
        core.adopt(replayed)
        server = GearmanServer(core, store, TransportLimits(max_packet=settings.max_packet))
        kept = f"in the database {settings.database!r}" if store else "in memory only"
        replays = f", {len(replayed)} jobs replayed" if store else ""
        greeting = f"gearman_server {name} listens on {address}; jobs are kept {kept}{replays}."
        del replayed
        gc.collect()
        gc.freeze()
        # Jobs and packets make no cycles; looking for some would only cost.
        gc.set_threshold(50_000, 20, 100)
        try:
            with asyncio.Runner(loop_factory=_loop_factory()) as runner:
                runner.run(self._run(server, sockets, greeting))
        except StoreError as error:
            raise CommandError(str(error)) from error
        self.stdout.write("gearman_server stopped.")

    async def _run(self, server: GearmanServer, sockets: list[socket.socket], greeting: str) -> None:
        stopped = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopped.set)
        await server.serve(sockets, stopped, ready=lambda: self._greet(greeting))

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


def _count(text: str) -> int:
    if not text.isdecimal():
        raise ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def _name(text: str) -> str:
    # Stands in every handle, which other implementations keep in 64 bytes.
    if not 0 < len(text) <= 40 or not text.isascii() or not text.isprintable() or " " in text:
        raise ArgumentTypeError(f"{text!r} is not a name: 1 to 40 ASCII characters without spaces")
    return text
