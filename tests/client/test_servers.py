"""Several servers: which one is tried, and what becomes of a job when one of them dies."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from django_gearman.client.aio import AsyncClient
from django_gearman.client.servers import Servers, took_time
from django_gearman.client.sync import Client
from django_gearman.exceptions import ConnectionFailed, ConnectionLost, GearmanError, ResponseTimeout
from django_gearman.protocol.packets import PacketType
from django_gearman.worker.loop import AssignedJob
from tests import harness

from .fake_server import Peer, fake_server, play

P = PacketType
NAMES = ["a:1", "b:2", "c:3", "d:4"]


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class TestPreference:
    """The first that answers."""

    def test_in_their_order(self) -> None:
        assert Servers(NAMES).order() == NAMES
        assert Servers(NAMES).order(b"key") == NAMES

    def test_a_refusal_puts_last(self) -> None:
        """Trying costs nothing: should all be away, one may have come back."""
        clock = Clock()
        servers = Servers(NAMES, clock=clock)
        servers.failed("a:1", waited=False)
        assert servers.order() == ["b:2", "c:3", "d:4", "a:1"]
        clock.now += 5.1
        assert servers.order() == NAMES

    def test_a_server_that_is_waited_for_is_left_alone(self) -> None:
        clock = Clock()
        servers = Servers(NAMES[:2], clock=clock)
        servers.failed("a:1", waited=True)
        assert servers.order() == ["b:2"]
        servers.failed("b:2", waited=True)
        assert servers.order() == []
        assert "it did not answer a moment ago and is tried again in 5.0 s" in str(servers.unreachable())

    def test_impatience_tells_nothing(self) -> None:
        clock = Clock()
        servers = Servers(NAMES[:2], clock=clock)
        servers.failed("a:1", waited=None)
        assert servers.order() == ["b:2", "a:1"]
        servers.failed("b:2", waited=True)
        servers.failed("b:2", waited=None)
        assert servers.order() == ["a:1"]

    def test_half_open_for_one_caller(self) -> None:
        clock = Clock()
        servers = Servers(NAMES[:2], clock=clock)
        servers.failed("a:1", waited=True)
        clock.now += 5.1
        assert servers.order() == ["a:1", "b:2"]
        servers.trying("a:1")
        assert servers.order() == ["b:2"], "the others do not wait for it meanwhile"
        servers.answered("a:1")
        assert servers.order() == ["a:1", "b:2"]

    def test_one_that_is_suspected_is_asked_by_all(self) -> None:
        clock = Clock()
        servers = Servers(NAMES[:1], clock=clock)
        servers.suspect("a:1")
        assert servers.may_hang("a:1")
        servers.trying("a:1")
        assert servers.order() == ["a:1"], "it may be there, and only slow"
        servers.failed("a:1", waited=True)
        assert servers.order() == []
        clock.now += 5.1
        servers.suspect("a:1")
        servers.failed("a:1", waited=True)
        clock.now += 5.1
        assert servers.order() == [], "ten seconds, the second time"
        servers.answered("a:1")
        assert not servers.may_hang("a:1")

    def test_longer_each_time_up_to_a_minute(self) -> None:
        clock = Clock()
        servers = Servers(NAMES[:1], clock=clock)
        pauses = []
        for _ in range(6):
            servers.failed("a:1", waited=True)
            began = clock.now
            while not servers.order():
                clock.now += 0.5
            pauses.append(round(clock.now - began))
        assert pauses == [5, 10, 20, 40, 60, 60]

    def test_of_many_that_wait_together_one_counts(self) -> None:
        clock = Clock()
        servers = Servers(NAMES[:1], clock=clock)
        for pause in (5, 10):
            servers.trying("a:1")
            for _ in range(40):
                servers.failed("a:1", waited=True)
            clock.now += pause - 0.1
            assert servers.order() == []
            clock.now += 0.2
            assert servers.order() == ["a:1"]

    @pytest.mark.parametrize(("cause", "is_told"), [(ConnectionRefusedError, False), (OSError, True)])
    def test_a_refusal_that_is_heard_of_late(self, cause: type[OSError], is_told: bool) -> None:
        """As in a process of many threads."""
        error = ConnectionFailed("a:1", "away")
        error.__cause__ = cause()
        assert took_time(error, 0.5, 1.0) is is_told
        assert took_time(error, 1.5, 1.0), "the first of its addresses may not have answered"
        assert not took_time(error, 0.05, 1.0)

    @pytest.mark.parametrize("names", ["127.0.0.1:4730", [], ["host:port"]])
    def test_names(self, names: Any) -> None:
        with pytest.raises(ValueError, match=r"servers must be a sequence|not an address"):
            Servers(names)


class TestSpread:
    """By a hash of the unique: consistent hashing."""

    keys = [b"unique %d" % number for number in range(20_000)]

    def test_equal_jobs_meet(self) -> None:
        one, other = Servers(NAMES, spread=True), Servers(NAMES[::-1], spread=True)
        assert all(one.order(key) == other.order(key) for key in self.keys[:500])

    def test_shares_are_fair(self) -> None:
        servers = Servers(NAMES, spread=True)
        shares = Counter(servers.order(key)[0] for key in self.keys)
        assert all(0.7 < shares[name] / (len(self.keys) / 4) < 1.3 for name in NAMES), shares

    def test_losing_one_moves_its_share_alone(self) -> None:
        servers = Servers(NAMES, spread=True)
        before = {key: servers.order(key)[0] for key in self.keys}
        servers.failed("b:2", waited=True)
        after = {key: servers.order(key)[0] for key in self.keys}
        moved = [key for key in self.keys if before[key] != after[key]]
        assert {before[key] for key in moved} == {"b:2"}
        assert len(moved) == Counter(before.values())["b:2"]
        # To all the others, not to one neighbour.
        assert len({after[key] for key in moved}) == 3

    def test_jobs_without_a_unique_go_anywhere(self) -> None:
        servers = Servers(NAMES, spread=True)
        shares = Counter(servers.order()[0] for _ in range(2000))
        assert min(shares[name] for name in NAMES) > 300

    def test_each_server_once(self) -> None:
        servers = Servers([*NAMES, "a:1"], spread=True)
        assert sorted(servers.order(b"x")) == NAMES


@pytest.fixture(scope="module")
def both() -> Iterator[list[harness.GearmanServerProcess]]:
    with harness.server(store="memory") as one, harness.server(store="memory") as other:
        yield [one, other]


@pytest.fixture
def two(both: list[harness.GearmanServerProcess]) -> list[harness.GearmanServerProcess]:
    """Two running servers, whatever the test before has done to them."""
    for each in both:
        if not each.is_running:
            each.start()
    return both


def reverse(job: AssignedJob) -> bytes:
    return job.workload[::-1]


def echoes(client: Client, count: int) -> list[float]:
    """Seconds that each of some took."""
    took = []
    for _ in range(count):
        began = time.monotonic()
        assert client.echo(b"x") == b"x"
        took.append(time.monotonic() - began)
    return took


class TestFailOver:
    def test_to_the_next(self, two: list[harness.GearmanServerProcess]) -> None:
        one, other = two
        with (
            harness.worker_thread({"reverse": reverse}, one, other),
            Client([one.address, other.address], connect_timeout=20) as client,
        ):
            assert client.do("reverse", b"ab", timeout=10) == b"ba"
            one.kill()
            assert client.do("reverse", b"cd", timeout=10) == b"dc"
            assert client.do_background("f").startswith("H:")

    def test_back_to_the_first(self, two: list[harness.GearmanServerProcess]) -> None:
        one, other = two
        with Client([one.address, other.address], connect_timeout=20, circuit=0.2) as client:
            one.kill()
            client.do_background("moved")
            assert other.status()["moved"][0] == 1
            one.start()

            def is_back() -> bool:
                client.do_background("g")
                return "g" in one.status()

            harness.wait_until(is_back)

    def test_a_machine_that_is_away(self, two: list[harness.GearmanServerProcess]) -> None:
        """Its packets get no answer: the first call waits for half a second, no other one does."""
        with socket.socket() as listener, socket.socket() as first, socket.socket() as second:
            listener.bind(("127.0.0.1", 0))
            listener.listen(0)
            for sock in (first, second):
                sock.setblocking(False)
                sock.connect_ex(listener.getsockname())
            away = f"127.0.0.1:{listener.getsockname()[1]}"

            def check() -> None:
                with Client([away, two[0].address], timeout=10) as client:
                    took = echoes(client, 5)
                assert 0.4 < took[0] < 0.95
                assert max(took[1:]) < 0.2

            def check_alone() -> None:
                with Client([away]) as client:
                    with pytest.raises(ConnectionFailed):
                        client.echo(b"x")
                    began = time.monotonic()
                    with pytest.raises(
                        ConnectionFailed, match="did not answer a moment ago and is tried again"
                    ):
                        client.echo(b"x")
                    assert time.monotonic() - began < 0.2

            harness.in_one_try(check)
            harness.in_one_try(check_alone)

    def test_a_name_whose_first_address_is_silent(
        self, two: list[harness.GearmanServerProcess], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As of a host whose IPv6 leads nowhere. One of several must answer in time, too."""
        port = two[0].port
        real = socket.getaddrinfo

        def find(host: str, *args: Any, **options: Any) -> list[Any]:
            hosts = ["127.0.0.2", "127.0.0.1"] if host == "jobs.example.org" else [host]
            return [found for each in hosts for found in real(each, *args, **options)]

        async def echo_async(names: list[str]) -> bytes:
            async with AsyncClient(names, connect_timeout=3.0) as client:
                return await client.echo(b"x")

        with socket.socket() as listener, socket.socket() as first, socket.socket() as second:
            listener.bind(("127.0.0.2", port))
            listener.listen(0)
            for sock in (first, second):
                sock.setblocking(False)
                sock.connect_ex(listener.getsockname())
            monkeypatch.setattr(socket, "getaddrinfo", find)
            names = [f"jobs.example.org:{port}", "127.0.0.1:9"]

            def check() -> None:
                with Client(names, connect_timeout=3.0) as client:
                    assert client.echo(b"x") == b"x"
                assert asyncio.run(echo_async(names)) == b"x"

            harness.in_one_try(check)

    def test_a_server_that_hangs(self, two: list[harness.GearmanServerProcess]) -> None:
        """The kernel takes connections for it; only an answer proves that it is there."""
        one, other = two

        def check() -> None:
            with Client([one.address, other.address], timeout=10) as client:
                took = echoes(client, 3)
            assert took[0] < 0.95
            assert max(took[1:]) < 0.2

        one.signal(signal.SIGSTOP)
        try:
            harness.in_one_try(check)
        finally:
            one.signal(signal.SIGCONT)

    def test_one_that_begins_to_hang(self, two: list[harness.GearmanServerProcess]) -> None:
        """Who waits for its answer when that happens has his time-out; nobody waits a second time."""
        one, other = two

        def check() -> None:
            with Client([one.address, other.address], timeout=0.5) as client:
                client.echo(b"x")
                one.signal(signal.SIGSTOP)
                try:
                    with pytest.raises(ResponseTimeout):
                        client.echo(b"x")
                    began = time.monotonic()
                    assert client.echo(b"x") == b"x"
                    assert time.monotonic() - began < 0.2
                finally:
                    one.signal(signal.SIGCONT)

        harness.in_one_try(check)

    @pytest.mark.parametrize("how", ["do", "run_tasks"])
    def test_one_that_hangs_longer_than_its_callers_wait(
        self, two: list[harness.GearmanServerProcess], how: str
    ) -> None:
        """Each has a little time alone; the second finds out that nobody is there, and the third is told."""
        one, _ = two

        def ask(client: Client) -> tuple[type[Exception], float]:
            began = time.monotonic()
            try:
                if how == "do":
                    client.do("f", timeout=0.2)
                else:
                    task = client.add_task("f")
                    client.run_tasks(timeout=0.2)
                    task.result()
            except GearmanError as error:
                return type(error), time.monotonic() - began
            raise AssertionError("it hangs")

        def check() -> None:
            with Client([one.address], timeout=30, connect_timeout=0.6) as client:
                client.echo(b"x")
                one.signal(signal.SIGSTOP)
                try:
                    kinds, took = zip(*(ask(client) for _ in range(3)), strict=True)
                finally:
                    one.signal(signal.SIGCONT)
                assert kinds == (ResponseTimeout, ConnectionFailed, ConnectionFailed)
                assert 0.5 < took[1] < 1.5
                assert took[2] < 0.2

        harness.in_one_try(check)

    def test_what_was_connected_before_is_not_trusted(self, two: list[harness.GearmanServerProcess]) -> None:
        """Once somebody has waited in vain, a connection has to prove itself."""
        one, other = two

        def check() -> None:
            with Client([one.address, other.address], timeout=2.0, circuit=0.05) as client:
                client.echo(b"x")
                if hasattr(client, "_session"):
                    with client._session([one.address]), client._session([one.address]):
                        pass  # there are two of them now
                one.signal(signal.SIGSTOP)
                try:
                    with pytest.raises(ResponseTimeout):
                        client.echo(b"x")
                    harness.wait_until(lambda: not client._servers.is_shut(one.address))
                    began = time.monotonic()
                    assert client.echo(b"x") == b"x"
                    assert time.monotonic() - began < 0.95
                finally:
                    one.signal(signal.SIGCONT)

        harness.in_one_try(check)

    def test_equal_jobs_meet(self, two: list[harness.GearmanServerProcess]) -> None:
        addresses = [each.address for each in two]
        with (
            Client(addresses, spread=True, connect_timeout=20) as one,
            Client(addresses[::-1], spread=True, connect_timeout=20) as other,
        ):
            for number in range(30):
                handle = one.do_background("spread", unique=f"u{number}")
                assert other.do_background("spread", unique=f"u{number}") == handle
                assert other.job_status(handle).known
                assert other.job_status_unique(f"u{number}").known
        totals = [each.status()["spread"][0] for each in two]
        assert sum(totals) == 30
        assert min(totals) > 0


class TestResubmission:
    """What was in flight when a connection broke."""

    taken = (P.JOB_CREATED, b"H:2")
    proof = (P.ECHO_REQ, (P.ECHO_RES, b""))

    def both(self, first: Any, second: Any) -> Any:
        return fake_server(play(*self.proof, *first)), fake_server(play(*self.proof, *second, None))

    def test_background_that_was_not_acknowledged(self) -> None:
        one, other = self.both([P.SUBMIT_JOB_BG], [P.SUBMIT_JOB_BG, self.taken])
        with one as first, other as second, Client(addresses(first, second), timeout=30) as client:
            assert client.do_background("f", b"w") == "H:2"

    @pytest.mark.parametrize("acknowledged", [False, True])
    def test_foreground(self, acknowledged: bool) -> None:
        one, other = self.both([P.SUBMIT_JOB, *([(P.JOB_CREATED, b"H:1")] if acknowledged else [])], [])
        with (
            one as first,
            other as second,
            Client(addresses(first, second), timeout=30) as client,
            pytest.raises(ConnectionLost),
        ):
            client.do("f", b"w", unique="u", timeout=30)

    @pytest.mark.parametrize("acknowledged", [False, True])
    def test_foreground_when_it_is_told_to(self, acknowledged: bool) -> None:
        one, other = self.both(
            [P.SUBMIT_JOB, *([(P.JOB_CREATED, b"H:1")] if acknowledged else [])],
            [P.SUBMIT_JOB, self.taken, (P.WORK_COMPLETE, b"H:2", b"r")],
        )
        with one as first, other as second, Client(addresses(first, second), timeout=30) as client:
            assert client.do("f", b"w", timeout=30, resubmit=True) == b"r"

    def test_not_for_ever(self) -> None:
        """Each server gets it once."""
        submitted: list[bytes] = []

        def script(peer: Peer) -> None:
            play(*self.proof)(peer)
            submitted.append(peer.expect(P.SUBMIT_JOB_BG)[2])

        with (
            fake_server(script, script) as first,
            fake_server(script, script) as second,
            Client(addresses(first, second), timeout=30) as client,
            pytest.raises(ConnectionLost),
        ):
            client.do_background("f", b"w")
        assert submitted == [b"w", b"w"]

    def test_foreground_goes_back_to_one_that_broke(self) -> None:
        """As when servers are restarted one after the other."""
        lose = play(*self.proof, P.SUBMIT_JOB)
        answer = play(*self.proof, P.SUBMIT_JOB, self.taken, (P.WORK_COMPLETE, b"H:2", b"r"), None)
        with (
            fake_server(lose, answer) as first,
            fake_server(lose) as second,
            Client(addresses(first, second), timeout=30) as client,
        ):
            assert client.do("f", b"w", timeout=30, resubmit=True) == b"r"

    @pytest.mark.parametrize("background", [False, True])
    def test_back_to_one_that_broke_since_the_other_is_away(self, background: bool) -> None:
        """The first was killed and is back when the second is restarted."""
        submit = P.SUBMIT_JOB_BG if background else P.SUBMIT_JOB
        lose = play(*self.proof, submit)
        answer = play(*self.proof, submit, self.taken, (P.WORK_COMPLETE, b"H:2", b"r"), None)
        with (
            fake_server(lose, answer) as first,
            Client(addresses(first, harness.free_port()), timeout=30) as client,
        ):
            if background:
                assert client.do_background("f", b"w") == "H:2"
            else:
                assert client.do("f", b"w", timeout=30, resubmit=True) == b"r"

    def test_not_back_for_ever(self) -> None:
        lose = play(*self.proof, P.SUBMIT_JOB)
        with (
            fake_server(*[lose] * 10) as first,
            Client(addresses(first, harness.free_port()), timeout=30) as client,
            pytest.raises(ConnectionLost),
        ):
            client.do("f", b"w", timeout=30, resubmit=True)

    def test_tasks_go_back_to_one_that_broke(self) -> None:
        """As ``do``."""
        lose = play(*self.proof, P.SUBMIT_JOB)
        answer = play(*self.proof, P.SUBMIT_JOB, self.taken, (P.WORK_COMPLETE, b"H:2", b"r"), None)
        with (
            fake_server(lose, answer) as first,
            fake_server(lose) as second,
            Client(addresses(first, second), timeout=30) as client,
        ):
            task = client.add_task("f", b"w")
            client.run_tasks(timeout=30, resubmit=True)
        assert task.result() == b"r"

    @pytest.mark.parametrize("background", [False, True])
    def test_tasks_back_to_one_that_broke_since_the_other_is_away(self, background: bool) -> None:
        submit = P.SUBMIT_JOB_BG if background else P.SUBMIT_JOB
        lose = play(*self.proof, submit)
        answer = play(*self.proof, submit, self.taken, (P.WORK_COMPLETE, b"H:2", b"r"), None)
        with (
            fake_server(lose, answer) as first,
            Client(addresses(first, harness.free_port()), timeout=30) as client,
        ):
            task = client.add_task_background("f", b"w") if background else client.add_task("f", b"w")
            client.run_tasks(timeout=30, resubmit=not background)
        assert (task.handle, task.error) == ("H:2", None)

    def test_tasks_not_back_for_ever(self) -> None:
        lose = play(*self.proof, P.SUBMIT_JOB)
        with (
            fake_server(*[lose] * 10) as first,
            Client(addresses(first, harness.free_port()), timeout=30) as client,
        ):
            task = client.add_task("f", b"w")
            client.run_tasks(timeout=30, resubmit=True)
        assert isinstance(task.error, ConnectionLost)

    def test_tasks(self) -> None:
        one, other = self.both(
            [P.SUBMIT_JOB_BG, (P.JOB_CREATED, b"H:1"), P.SUBMIT_JOB_BG, P.SUBMIT_JOB],
            [P.SUBMIT_JOB_BG, self.taken],
        )
        with one as first, other as second, Client(addresses(first, second), timeout=30) as client:
            kept = client.add_task_background("f", b"1")
            moved = client.add_task_background("f", b"2")
            lost = client.add_task("f", b"3")
            client.run_tasks(timeout=30)
        assert (kept.handle, kept.server.endswith(str(first))) == ("H:1", True)
        assert (moved.handle, moved.server.endswith(str(second))) == ("H:2", True)
        with pytest.raises(ConnectionLost):
            lost.result()

    def test_tasks_that_are_told_to(self) -> None:
        """Each by itself: what may run twice moves, its neighbour does not."""
        one, other = self.both(
            [P.SUBMIT_JOB, P.SUBMIT_JOB], [P.SUBMIT_JOB, self.taken, (P.WORK_COMPLETE, b"H:2", b"r")]
        )
        with one as first, other as second, Client(addresses(first, second), timeout=5) as client:
            stays, moves = client.add_task("f", b"1"), client.add_task("f", b"2")
            moves.resubmit = True
            client.run_tasks(timeout=5)
        assert moves.result() == b"r"
        assert isinstance(stays.error, ConnectionLost)


def addresses(*ports: int) -> list[str]:
    return [f"127.0.0.1:{port}" for port in ports]
