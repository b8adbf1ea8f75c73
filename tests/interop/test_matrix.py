"""
Clients of every language at workers of every language.

Over our server all pairs; over the C gearmand those where one end is ours.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from .languages import (
    CLIENTS,
    FUNCTIONS,
    SCRIPTS,
    WORKERS,
    AnyClient,
    Event,
    ScriptClient,
    Server,
    ToolClient,
    client_of,
    start_worker,
    wait_for_pids,
    whole,
)

pytestmark = [pytest.mark.acceptance, pytest.mark.foreign]

EVERY_BYTE = bytes(range(256))
LARGE = random.Random(1).randbytes(8 * 1024 * 1024)
REPORT = [
    Event("status", b"1/3"),
    Event("data", b"part 1"),
    Event("status", b"2/3"),
    Event("data", b"part 2"),
    Event("status", b"3/3"),
    Event("data", b"part 3"),
    Event("warning", b"almost"),
    Event("complete", b"done"),
]


def pairs(
    function: str = "reverse",
    *,
    clients: Sequence[str] = CLIENTS,
    but: Callable[[str, str, str], bool] = lambda server, client, worker: False,
) -> pytest.MarkDecorator:
    """
    Every server, client and worker that the file's first lines speak of.

    Args:
        function: What the worker must offer.
        but: Which of them to leave out.
    """
    return pytest.mark.parametrize(
        ("field_name", "client_language", "language"),
        [
            pytest.param(f"{server}_field", client, worker, id=f"{server} server, {client}, {worker}")
            for server in ("our", "their")
            for client in clients
            for worker in WORKERS
            if function in FUNCTIONS[worker]
            and (server == "our" or "ours" in (client, worker))
            and not but(server, client, worker)
        ],
    )


@pytest.fixture(scope="module")
def our_field(our_server: Server) -> Iterator[Server]:
    """Our server, with a worker of every language."""
    with ExitStack() as stack:
        for language in WORKERS:
            start_worker(stack, language, our_server)
        yield our_server


@pytest.fixture(scope="module")
def their_field(their_server: Server) -> Iterator[Server]:
    """The C gearmand, with a worker of every language."""
    with ExitStack() as stack:
        for language in WORKERS:
            start_worker(stack, language, their_server)
        yield their_server


@pytest.fixture
def field(field_name: str, request: pytest.FixtureRequest) -> Server:
    return request.getfixturevalue(field_name)


@pytest.fixture
def client(client_language: str) -> AnyClient:
    return client_of(client_language)


class TestEachPair:
    @pairs()
    def test_workloads(self, field: Server, client: AnyClient, language: str):
        """Every byte there is, at all three priorities."""
        function = f"{language}.reverse"
        assert client.run(field, function, EVERY_BYTE) == [Event("complete", EVERY_BYTE[::-1])]
        assert client.run(field, function, b"ab", priority="high") == [Event("complete", b"ba")]
        assert client.run(field, function, b"\0a\0", priority="low") == [Event("complete", b"\0a\0")]

    # libgearman refuses it unless it is a null pointer, which PHP does not pass. Perl's worker leaves
    # the NUL before an empty result out, and gearmand waits for it.
    @pairs(
        but=lambda server, client, worker: client == "php" or (server, worker) == ("their", "perl"),
    )
    def test_empty_workload(self, field: Server, client: AnyClient, language: str):
        assert client.run(field, f"{language}.reverse", b"") == [Event("complete", b"")]

    @pairs()
    def test_workload_larger_than_every_buffer(self, field: Server, client: AnyClient, language: str):
        large = LARGE[: 128 * 1024]
        assert client.run(field, f"{language}.reverse", large) == [Event("complete", large[::-1])]

    @pairs()
    def test_background(self, field: Server, client: AnyClient, language: str, tmp_path):
        path = tmp_path / "made"
        path.touch()
        client.background(field, f"{language}.hold", str(path).encode())
        wait_for_pids(path, 1)


class TestWhatAWorkerReports:
    @pairs("report")
    def test_data_status_and_warning(self, field: Server, client: AnyClient, language: str):
        events = client.run(field, f"{language}.report")
        if isinstance(client, ToolClient):
            # It prints warnings to standard error, and how far the job is after all the rest.
            assert whole(events).splitlines() == [
                b"part 1part 2part 3done33% Complete",
                b"66% Complete",
                b"100% Complete",
            ]
        else:
            assert events == REPORT

    @pairs("fail")
    def test_failure(self, field: Server, client: AnyClient, language: str):
        assert client.run(field, f"{language}.fail") == [Event("fail", b"")]

    # gearmand sends WORK_FAIL with a NUL to who did not ask for exceptions, which the program does not do.
    @pairs("throw", but=lambda server, client, worker: (server, client) == ("their", "tool"))
    def test_exception(self, field: Server, client: AnyClient, language: str):
        (event,) = client.run(field, f"{language}.throw")
        if isinstance(client, ToolClient):
            assert event.name == "fail"
        else:
            assert event.name == "exception"
            assert b"no luck" in event.value

    @pairs("unique")
    def test_unique(self, field: Server, client: AnyClient, language: str):
        assert whole(client.run(field, f"{language}.unique", unique="photo 7")) == b"photo 7"


class TestCallsWithoutCallbacks:
    """``doNormal`` of PHP and ``gearman_client_do`` of C, which put parts and result together."""

    @pairs(clients=SCRIPTS)
    def test_do(self, field: Server, client: ScriptClient, language: str):
        for priority in ("high", "normal", "low"):
            events = client.run(field, f"{language}.reverse", b"a\0b", priority=priority, how="do")
            assert events == [Event("complete", b"b\0a")]
        if "report" in FUNCTIONS[language]:
            assert whole(client.run(field, f"{language}.report", how="do")) == b"part 1part 2part 3done"
        for name, outcome in (("fail", "fail"), ("throw", "exception")):
            if name in FUNCTIONS[language]:
                assert client.run(field, f"{language}.{name}", how="do")[-1].name == outcome


class TestEightMegabytes:
    """
    All at once, since libgearman waits for seconds and does nothing when it receives so much.

    The command line's program works for as long, and gets less.
    """

    PAIRS = [
        ("php", "ours"),
        ("perl", "ours"),
        ("c", "ours"),
        ("ours", "php"),
        ("ours", "perl"),
        ("ours", "c"),
        ("ours", "tool"),
    ]

    @pytest.mark.parametrize("server_name", ["our_field", "their_field"])
    def test_of_random_bytes(self, server_name: str, request: pytest.FixtureRequest):
        server = request.getfixturevalue(server_name)

        def run(pair: tuple[str, str]) -> bool:
            large = LARGE[: 512 * 1024] if "tool" in pair else LARGE
            client, worker = pair
            events = client_of(client).run(server, f"{worker}.reverse", large)
            return events == [Event("complete", large[::-1])]

        with ThreadPoolExecutor(len(self.PAIRS)) as pool:
            came_back = dict(zip(self.PAIRS, pool.map(run, self.PAIRS), strict=True))
        assert all(came_back.values()), came_back


class TestPerlsFalsehoods:
    """Perl's worker sends WORK_COMPLETE without NUL and data for what is false to Perl."""

    @pytest.mark.parametrize("name", ["zero", "empty"])
    def test_worker_goes_on(self, our_field: Server, name: str):
        for _ in range(2):
            assert client_of("ours").run(our_field, f"perl.{name}") == [Event("complete", b"")]

    def test_worker_that_dies_in_a_job_goes_on(self, our_field: Server):
        """WORK_EXCEPTION and then WORK_FAIL. gearmand's ERROR about the second ends the worker."""
        for client in map(client_of, CLIENTS):
            (event,) = client.run(our_field, "perl.die")
            assert event.name == ("fail" if isinstance(client, ToolClient) else "exception")
        assert client_of("ours").run(our_field, "perl.reverse", b"abc") == [Event("complete", b"cba")]
