"""``AsyncClient`` and ``run_tasks`` over TLS; ``tests/test_tls.py`` has the rest."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from django_gearman.client.aio import AsyncClient
from django_gearman.exceptions import ConnectionFailed, ConnectionLost
from django_gearman.protocol.packets import PacketType
from tests import harness
from tests.test_tls import LIMIT, Files, files, loop_factory, serving

from .fake_server import fake_server, play

__all__ = ["files", "loop_factory"]

Run = Callable[[Coroutine[Any, Any, Any]], Any]


@pytest.fixture
def run(loop_factory: Callable[[], asyncio.AbstractEventLoop] | None) -> Run:
    """``asyncio.run``, on asyncio's own loop and on uvloop's."""

    def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            return runner.run(coroutine)

    return run


class TestPlainText:
    def test_both_loops(self, run: Run) -> None:
        data = os.urandom(2_000_000)

        async def main(address: str) -> None:
            async with AsyncClient([address]) as client:
                assert await asyncio.gather(*[client.echo(data) for _ in range(5)]) == [data] * 5

        with harness.server(store="memory") as server:
            run(main(server.address))
            # Left to the end of the loop.
            assert run(AsyncClient([server.address]).echo(b"x")) == b"x"

    def test_nobody_listens(self, run: Run) -> None:
        client = AsyncClient([f"127.0.0.1:{harness.free_port()}"])
        with pytest.raises(ConnectionFailed, match=r"\(Connection refused\); is `manage.py gearman_server`"):
            run(client.echo(b"x"))


class TestAsyncClient:
    def test_large_ones_both_ways(self, files: Files, run: Run) -> None:
        data = os.urandom(1_000_000)

        async def main(address: str) -> None:
            async with AsyncClient([address], tls=files.client(), connect_timeout=LIMIT) as client:
                assert await asyncio.gather(*[client.echo(data) for _ in range(10)]) == [data] * 10
                handle = await client.do_background("f", b"w")
                assert (await client.job_status(handle)).known

        with serving(files.server()) as place:
            run(main(place.name))

    @pytest.mark.parametrize(
        ("server", "client", "message"),
        [
            ("good", "foreign", "did its CA sign the certificate in TLS_CERTIFICATE"),
            ("good", None, "did its CA sign the certificate in TLS_CERTIFICATE"),
            ("foreign", "good", "its TLS certificate is not trusted"),
            ("elsewhere", "good", r"its TLS certificate is not for 127\.0\.0\.1"),
            ("expired", "good", "certificate has expired"),
        ],
    )
    def test_who_is_not_trusted_submits_nothing(
        self, files: Files, run: Run, server: str, client: str | None, message: str
    ) -> None:
        context = files.server() if server == "good" else files.careless_server(server)
        with serving(context) as place:
            caller = AsyncClient([place.name], tls=files.client(client), connect_timeout=LIMIT)
            with pytest.raises(ConnectionFailed, match=message):
                run(caller.do_background("f"))

    def test_a_server_of_plain_text(self, files: Files, run: Run) -> None:
        with fake_server(play(b"ERR unknown\r\n", None)) as port:
            caller = AsyncClient([f"127.0.0.1:{port}"], tls=files.client(), connect_timeout=LIMIT)
            with pytest.raises(ConnectionFailed, match=r"it does not speak TLS|during the TLS handshake"):
                run(caller.echo(b"x"))

    @harness.tried_again
    def test_a_server_that_hangs(self, files: Files, run: Run) -> None:
        with fake_server(play(None)) as port:
            caller = AsyncClient([f"127.0.0.1:{port}"], tls=files.client(), connect_timeout=0.3)
            with pytest.raises(ConnectionFailed, match="in time"):
                run(caller.echo(b"x"))

    def test_a_plain_client_is_told_that_the_server_speaks_tls(self, run: Run) -> None:
        alert = b"\x15\x03\x01\0\x02\x02\x46"
        with (
            fake_server(play(PacketType.OPTION_REQ, alert, None)) as port,
            pytest.raises(ConnectionLost, match="it speaks TLS and we do not"),
        ):
            run(AsyncClient([f"127.0.0.1:{port}"]).echo(b"x"))


class TestTasks:
    def test_large_ones_both_ways(self, files: Files) -> None:
        with serving(files.server()) as place, place.client(files.client()) as client:
            for number in range(40):
                client.add_task_background("f", os.urandom(500_000), unique=f"{number}")
            tasks = client.run_tasks(timeout=LIMIT)
            assert len({task.handle for task in tasks}) == 40
            for task in tasks:
                client.add_task_status(task.handle)
            assert all(task.known for task in client.run_tasks(timeout=LIMIT))
