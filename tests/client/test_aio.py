"""``AsyncClient``: all that is promised of ``Client``, and what only asyncio asks for."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, closing
from itertools import pairwise
from typing import Any

import pytest

from django_gearman.client import aio
from django_gearman.client.aio import AsyncClient
from django_gearman.client.tasks import Data, Task
from django_gearman.exceptions import ConnectionLost, ResponseTimeout, ResultTooLarge
from django_gearman.protocol.packets import PacketType, encode_response
from django_gearman.worker.loop import AssignedJob
from tests import harness

from . import test_servers, test_sync, test_tasks
from .awaited import AwaitedClient
from .fake_server import Peer, fake_server, play
from .test_servers import both, two
from .test_sync import count_clients, server, worker

__all__ = ["both", "server", "two", "worker"]

P = PacketType


@pytest.fixture(autouse=True)
def everywhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The tests of the blocking client get this one."""
    for module in (test_sync, test_tasks, test_servers):
        monkeypatch.setattr(module, "Client", AwaitedClient)
    yield
    while AwaitedClient.made:
        AwaitedClient.made.pop().close()


@pytest.fixture
def client(server: harness.GearmanServerProcess) -> Iterator[AwaitedClient]:
    with AwaitedClient([server.address], timeout=10) as made:
        yield made


class TestForeground(test_sync.TestForeground):
    # Call-backs are no coroutines.
    test_a_callback_may_use_the_client = None


class TestStreams(test_sync.TestStreams):
    pass


class TestBackground(test_sync.TestBackground):
    pass


class TestLater(test_sync.TestLater):
    pass


class TestReduce(test_sync.TestReduce):
    pass


class TestUniqueStatus(test_sync.TestUniqueStatus):
    # Whoever waits there does so in another thread.
    test_running_with_clients = None


class TestOtherServers(test_sync.TestOtherServers):
    pass


class TestQuestions(test_sync.TestQuestions):
    pass


class TestRefusals(test_sync.TestRefusals):
    pass


class TestTimeouts(test_sync.TestTimeouts):
    pass


class TestWaiting(test_sync.TestWaiting):
    pass


class TestWatch(test_sync.TestWatch):
    def test_not_told(self) -> None:
        """What comes late is for nobody; the connection stays."""
        script = play(
            self.asked,
            (P.OPTION_RES, b"exceptions"),
            self.asked,
            (P.OPTION_RES, b"listen row 5"),
            P.ECHO_REQ,
            (P.WORK_COMPLETE, b"row 5", b""),
            (P.ECHO_RES, b"x"),
            None,
        )
        with fake_server(script) as port, AwaitedClient([f"127.0.0.1:{port}"], timeout=5) as client:
            with closing(client.watch("5")) as watch:
                assert not watch.wait(0.05)
                assert watch.is_open
            assert client.echo(b"x") == b"x"

    def test_two_of_one_row(self) -> None:
        """Each is told, and one that left is not missed."""

        async def main() -> None:
            async with connected(f"127.0.0.1:{port}", timeout=5) as client:
                one, two, gone = [await client.watch("5") for _ in range(3)]
                gone.close()
                assert await asyncio.gather(one.wait(10), two.wait(10)) == [True, True]
                one.close()
                two.close()

        ended = (P.WORK_COMPLETE, b"row 5", b"")
        asked = [self.asked, (P.OPTION_RES, b"listen row 5")] * 3
        script = play(self.asked, (P.OPTION_RES, b"exceptions"), *asked, *[ended] * 3, None)
        with fake_server(script) as port:
            asyncio.run(main())

    def test_what_comes_as_the_wait_begins(self) -> None:
        """In the same turn of the loop, or while nobody waits."""
        ended = encode_response(P.WORK_COMPLETE, b"row 5", b"")

        async def main() -> None:
            async with connected(f"127.0.0.1:{port}", timeout=5) as client:
                for comes_before in (False, True):
                    watch = await client.watch("5")
                    link, request = watch._asked[0]
                    await until(lambda request=request: request.handle is not None)
                    if comes_before:
                        link.data_received(ended)
                    else:
                        asyncio.get_running_loop().call_soon(link.data_received, ended)
                    # Not that there is another chance: who missed it would wait for all of the time.
                    async with asyncio.timeout(30):
                        assert await watch.wait(600)
                    watch.close()

        asked = [self.asked, (P.OPTION_RES, b"listen row 5")] * 2
        script = play(self.asked, (P.OPTION_RES, b"exceptions"), *asked, None)
        with fake_server(script) as port:
            asyncio.run(main())


class TestWatchGroup(test_sync.TestWatchGroup):
    def test_who_is_cancelled_as_it_asks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of a server that was asked meanwhile nothing stays in use."""
        monkeypatch.setattr(aio, "NUDGE_TIMEOUT", 60.0)

        async def main() -> None:
            servers = f"127.0.0.1:{port}", f"127.0.0.1:{hung}"
            async with connected(*servers, connect_timeout=60) as client:
                assert await client.echo(b"x") == b"x"
                (link,) = client._links().open.values()
                asking = asyncio.create_task(client.watch_group("5"))
                await until(lambda: link.users == 1)
                await until(lambda: not link.protocol.awaits_answer)
                asking.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await asking
                assert link.users == 0
                assert not link.protocol.has_jobs

        script = play(P.ECHO_REQ, (P.ECHO_RES, b""), P.ECHO_REQ, (P.ECHO_RES, b"x"))
        with (
            fake_server(lambda peer: (script(peer), test_sync.listened()(peer))) as port,
            socket.create_server(("127.0.0.1", 0)) as silent,
        ):
            hung = silent.getsockname()[1]
            asyncio.run(main())


class TestFaults(test_sync.TestFaults):
    pass


class TestTasks(test_tasks.TestTasks):
    pass


class TestLostTasks(test_tasks.TestLostTasks):
    pass


class TestFailOver(test_servers.TestFailOver):
    pass


class TestResubmission(test_servers.TestResubmission):
    pass


@asynccontextmanager
async def connected(*addresses: str, **options: Any) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(addresses, **{"timeout": 10, **options}) as made:
        yield made


async def until(condition: Any, limit: float = 10.0) -> None:
    async with asyncio.timeout(limit):
        while not condition():
            await asyncio.sleep(0.002)


class Held:
    """A function whose jobs run until they are let go."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.ran: list[bytes] = []

    def __call__(self, job: AssignedJob) -> bytes:
        self.ran.append(job.workload)
        self.go_on.wait(20)
        return b"held"


@pytest.fixture
def held(server: harness.GearmanServerProcess) -> Iterator[Held]:
    made = Held()
    with harness.worker_thread({"held": made}, server):
        yield made
        made.go_on.set()


class TestSideBySide:
    @pytest.mark.usefixtures("worker")
    def test_calls_share_one_connection(self, server: harness.GearmanServerProcess) -> None:
        async def main() -> None:
            before = count_clients(server)
            async with connected(server.address) as client:
                calls = [client.do("reverse", b"%d" % number) for number in range(500)]
                assert await asyncio.gather(*calls) == [(b"%d" % number)[::-1] for number in range(500)]
                assert await asyncio.to_thread(count_clients, server) == before + 1

        asyncio.run(main())

    def test_the_loop_goes_on_meanwhile(self, server: harness.GearmanServerProcess, held: Held) -> None:
        async def main() -> None:
            async with connected(server.address) as client:
                waiting = asyncio.create_task(client.do("held", b"1"))
                await until(lambda: held.ran)
                assert await client.echo(b"x") == b"x"
                held.go_on.set()
                assert await waiting == b"held"

        asyncio.run(main())

    def test_large_ones_do_not_block(self, server: harness.GearmanServerProcess) -> None:
        """More than the kernels take at once, both ways."""
        data = os.urandom(4_000_000)

        async def main() -> None:
            async with connected(server.address) as client:
                assert await asyncio.gather(*[client.echo(data) for _ in range(8)]) == [data] * 8

        asyncio.run(main())

    @pytest.mark.usefixtures("worker")
    def test_tasks_of_two_coroutines(self, server: harness.GearmanServerProcess) -> None:
        async def run(client: AsyncClient, text: bytes) -> list[bytes]:
            for number in range(20):
                client.add_task("reverse", b"%s%d" % (text, number))
                await asyncio.sleep(0)
            return [task.workload for task in await client.run_tasks(timeout=10)]

        async def main() -> None:
            async with connected(server.address) as client:
                found = await asyncio.gather(run(client, b"a"), run(client, b"b"))
            assert found == [[b"%s%d" % (text, number) for number in range(20)] for text in (b"a", b"b")]

        asyncio.run(main())


class TestLargeResults:
    """More than ``max_packet``: of one call, and not of those beside it."""

    def test_the_others_go_on(self, server: harness.GearmanServerProcess, held: Held) -> None:
        async def main() -> None:
            async with connected(server.address, max_packet=1000) as client:
                other = asyncio.create_task(client.do("held", timeout=60))
                await until(lambda: held.ran, limit=30)
                calls = [client.do("large", b"%d" % size, timeout=60) for size in (0, 3_000_000, 900, 1000)]
                found = await asyncio.gather(*calls, return_exceptions=True)
                assert [each if isinstance(each, bytes) else type(each) for each in found] == [
                    b"",
                    ResultTooLarge,
                    b"x" * 900,
                    ResultTooLarge,
                ]
                task = client.add_task("large", b"5000")
                (task,) = await client.run_tasks(timeout=60)
                assert isinstance(task.error, ResultTooLarge)
                (link,) = client._links().open.values()
                assert not link.is_spent
                held.go_on.set()
                assert await other == b"held"

        functions = {"large": lambda job: b"x" * int(job.workload)}
        with harness.worker_thread(functions, server):
            asyncio.run(main())

    @pytest.mark.parametrize("cuts", [[], range(200), [12], [13], [16], [17]])
    @pytest.mark.parametrize("kind", [P.WORK_COMPLETE, P.WORK_EXCEPTION])
    def test_in_pieces(self, kind: PacketType, cuts: list[int]) -> None:
        async def main() -> None:
            async with connected(f"127.0.0.1:{port}", max_packet=50) as client:
                large = asyncio.create_task(client.do("f", timeout=60))
                await until(lambda: any(link.protocol.has_jobs for link in client._links().open.values()))
                (link,) = client._links().open.values()
                data = encode_response(kind, b"H:1", b"x" * 100)
                data += encode_response(P.WORK_COMPLETE, b"H:1", b"for nobody")
                ends = [*cuts, len(data)]
                for start, end in pairwise([0, *ends]):
                    link.data_received(data[start:end])
                with pytest.raises(ResultTooLarge):
                    await large
                assert await client.echo(b"x") == b"x"

        script = play(P.SUBMIT_JOB, (P.JOB_CREATED, b"H:1"), P.ECHO_REQ, (P.ECHO_RES, b"x"), None)
        with fake_server(script) as port:
            asyncio.run(main())

    def test_whose_cannot_be_told(self) -> None:
        async def main() -> None:
            async with connected(f"127.0.0.1:{port}", max_packet=600) as client:
                with pytest.raises(ResultTooLarge):
                    await client.do("f", timeout=60)

        created = (P.JOB_CREATED, b"H:1")
        with fake_server(play(P.SUBMIT_JOB, created, (P.WORK_COMPLETE, b"H" * 601, b""), None)) as port:
            asyncio.run(main())


class TestCancellation:
    def test_the_connection_goes_on(self, server: harness.GearmanServerProcess, held: Held) -> None:
        async def main() -> None:
            async with connected(server.address) as client:
                other = asyncio.create_task(client.do("held", b"other"))
                await until(lambda: held.ran)
                cancelled = asyncio.create_task(client.do("held", b"cancelled"))
                await until(lambda: server.status()["held"][0] == 2)
                cancelled.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await cancelled
                assert await client.echo(b"x") == b"x"
                held.go_on.set()
                assert await other == b"held"
                # Nobody needs the old connection any more: what nobody waits for is dropped, or has run.
                await until(lambda: server.status()["held"][0] == 0)
                assert await client.echo(b"y") == b"y"

        asyncio.run(main())

    def test_its_job_is_dropped(self, server: harness.GearmanServerProcess) -> None:
        async def main() -> None:
            async with connected(server.address) as client:
                cancelled = asyncio.create_task(client.do("dropped", b"x"))
                await until(lambda: server.status().get("dropped", (0,))[0] == 1)
                cancelled.cancel()
                await until(lambda: server.status()["dropped"][0] == 0)
                assert await client.echo(b"x") == b"x"

        asyncio.run(main())

    def test_many_leave_few_connections(self, server: harness.GearmanServerProcess, held: Held) -> None:
        async def main() -> None:
            async with connected(server.address) as client:
                before = count_clients(server)
                waiting = []
                for number in range(40):
                    waiting.append(asyncio.create_task(client.do("held", b"%d" % number, timeout=30)))
                    with pytest.raises(ResponseTimeout):
                        await client.do("held", timeout=0.01)
                assert await asyncio.to_thread(count_clients, server) <= before + 10
                held.go_on.set()
                assert await asyncio.gather(*waiting) == [b"held"] * 40

        asyncio.run(main())

    @pytest.mark.usefixtures("worker")
    @pytest.mark.parametrize("seed", range(3))
    def test_answers_go_to_who_asked(self, server: harness.GearmanServerProcess, seed: int) -> None:
        """Hundreds of calls, of which many are cancelled or run out of time at random."""
        chance = random.Random(seed)

        async def call(client: AsyncClient, number: int) -> None:
            text = b"%d" % number
            kind = chance.randrange(4)
            if kind == 0:
                assert await client.echo(text) == text
            elif kind == 1:
                assert (await client.do_background("nobody serves this", text)).startswith("H:")
            else:
                timeout = chance.choice([None, 0.001, 0.005])
                assert await client.do("reverse", text, timeout=timeout) == text[::-1]

        async def main() -> None:
            async with connected(server.address) as client:
                calls = [asyncio.create_task(call(client, number)) for number in range(400)]
                for each in calls:
                    if chance.random() < 0.3:
                        await asyncio.sleep(chance.random() * 0.004)
                        each.cancel()
                found = await asyncio.gather(*calls, return_exceptions=True)
                assert {type(each) for each in found} <= {type(None), asyncio.CancelledError, ResponseTimeout}
                assert sum(each is None for each in found) > 50
                # All is as before.
                calls = [asyncio.create_task(client.do("reverse", b"%d" % each)) for each in range(100)]
                assert await asyncio.gather(*calls) == [(b"%d" % each)[::-1] for each in range(100)]
                links = client._links()
                await until(lambda: not links.retired)
                assert not any(link._waiting for link in links.open.values())

        asyncio.run(main())

    def test_who_waits_for_a_connection(self) -> None:
        """One that is cancelled while it is opened does not take it from the others."""
        with fake_server(play(P.ECHO_REQ, (P.ECHO_RES, b"x"), None)) as port:

            async def main() -> None:
                async with connected(f"127.0.0.1:{port}") as client:
                    first, second = (asyncio.create_task(client.echo(b"x")) for _ in range(2))
                    await asyncio.sleep(0)
                    first.cancel()
                    assert await second == b"x"

            asyncio.run(main())

    def test_a_stream_that_is_left(self, server: harness.GearmanServerProcess, held: Held) -> None:
        def tell(job: AssignedJob) -> bytes:
            job.send_data(b"part")
            held.go_on.wait(20)
            return b""

        async def main() -> None:
            async with connected(server.address) as client:
                async with aclosing(client.stream("tell and wait", timeout=20)) as parts:
                    async for part in parts:
                        assert part == Data(b"part")
                        break
                assert await client.echo(b"x") == b"x"

        with harness.worker_thread({"tell and wait": tell}, server):
            asyncio.run(main())
            held.go_on.set()


class TestLoops:
    """Connections belong to an event loop, and end with it."""

    def test_nothing_stays_open(self, server: harness.GearmanServerProcess) -> None:
        before = count_clients(server)
        client = AsyncClient([server.address])
        for _ in range(3):
            assert asyncio.run(client.echo(b"x")) == b"x"
        harness.wait_until(lambda: count_clients(server) == before)
        gc.collect()
        assert not client._links_of

    def test_nothing_stays_open_of_loops_closed_by_hand(self, server: harness.GearmanServerProcess) -> None:
        """Which end no asynchronous generators; the next loop forgets them."""
        before = count_clients(server)
        client = AsyncClient([server.address])

        def use() -> None:
            for _ in range(3):
                with closing(asyncio.new_event_loop()) as loop:
                    assert loop.run_until_complete(client.echo(b"x")) == b"x"
            del loop
            assert asyncio.run(client.echo(b"x")) == b"x"
            gc.collect()

        with pytest.warns(ResourceWarning, match="unclosed"):
            use()
        assert not client._links_of
        harness.wait_until(lambda: count_clients(server) == before)

    def test_loops_of_two_threads(self, server: harness.GearmanServerProcess) -> None:
        client = AsyncClient([server.address])
        together = threading.Barrier(2)
        failures: list[BaseException] = []

        async def main(name: bytes) -> None:
            for number in range(200):
                assert await client.echo(b"%s%d" % (name, number)) == b"%s%d" % (name, number)

        def run(name: bytes) -> None:
            together.wait(30)
            try:
                asyncio.run(main(name))
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=run, args=(name,)) for name in (b"a", b"b")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert not failures

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="wants fork")
    def test_forked_children_have_their_own(self, server: harness.GearmanServerProcess) -> None:
        client = AsyncClient([server.address])
        runner = asyncio.Runner()
        assert runner.run(client.echo(b"parent")) == b"parent"
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                if asyncio.run(client.echo(b"child")) == b"child":
                    status = 0
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert runner.run(client.echo(b"parent")) == b"parent"
        runner.run(client.close())
        runner.close()

    @pytest.mark.parametrize("turns", range(2, 7))
    def test_one_that_is_held_while_it_connects(
        self, server: harness.GearmanServerProcess, turns: int
    ) -> None:
        """By a view that imports, say: that is not taken for the silence of the server."""

        async def main() -> None:
            async with connected(server.address, connect_timeout=0.2) as client:
                asking = asyncio.create_task(client.echo(b"x"))
                for _ in range(turns):
                    await asyncio.sleep(0)
                time.sleep(0.25)
                assert await asking == b"x"

        asyncio.run(main())

    def test_a_server_that_goes_away(self) -> None:
        def leave(peer: Peer) -> None:
            peer.expect(P.SUBMIT_JOB)
            peer.expect(P.SUBMIT_JOB)

        async def main(port: int) -> None:
            async with connected(f"127.0.0.1:{port}") as client:
                calls = [client.do("f", b"%d" % number) for number in range(2)]
                found = await asyncio.gather(*calls, return_exceptions=True)
            assert [type(each) for each in found] == [ConnectionLost] * 2
            assert found[0] is not found[1]

        with fake_server(leave) as port:
            asyncio.run(main(port))


class TestCallbacks:
    @pytest.mark.usefixtures("worker")
    def test_one_that_fails_is_its_caller_s_alone(
        self, server: harness.GearmanServerProcess, held: Held
    ) -> None:
        async def main() -> None:
            async with connected(server.address) as client:
                other = asyncio.create_task(client.do("held"))
                await until(lambda: held.ran)
                with pytest.raises(ZeroDivisionError):
                    await client.do("tell", on_data=lambda data: 1 / 0)
                held.go_on.set()
                assert await other == b"held"

        asyncio.run(main())

    @pytest.mark.usefixtures("worker")
    def test_they_are_called_in_the_loop(self, server: harness.GearmanServerProcess) -> None:
        called: list[str] = []

        def note(task: Task) -> None:
            asyncio.get_running_loop()
            called.append(task.function)

        async def main() -> None:
            async with connected(server.address) as client:
                client.add_task("tell", on_data=note, on_complete=note)
                await client.run_tasks(timeout=10)

        asyncio.run(main())
        assert called == ["tell", "tell"]


@harness.tried_again
def test_time_is_not_spent_in_threads(server: harness.GearmanServerProcess) -> None:
    """Real asyncio: a hundred calls that wait need no thread."""

    async def main() -> None:
        async with connected(server.address) as client:
            began = time.monotonic()
            calls = [client.do("nobody's", timeout=0.3) for _ in range(100)]
            found = await asyncio.gather(*calls, return_exceptions=True)
            assert all(isinstance(each, ResponseTimeout) for each in found)
            assert time.monotonic() - began < 25
            assert threading.active_count() <= before  # another test's may end meanwhile

    before = threading.active_count()
    asyncio.run(main())
