"""One of two servers is killed amid a thousand submissions of each kind, by both clients."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any

import pytest

from django_gearman.client.aio import AsyncClient
from django_gearman.client.sync import Client
from django_gearman.exceptions import ConnectionFailed, ConnectionLost, GearmanError
from django_gearman.models import JobRecord
from tests import harness
from tests.app.jobs import append_line

from .conftest import SITE

pytestmark = [pytest.mark.acceptance, pytest.mark.django_db(transaction=True)]

JOBS = 1_000
CALLERS = 8
TIMEOUT = 60.0
"""Seconds that each foreground caller gives its job."""

PATIENT: dict[str, Any] = {"timeout": TIMEOUT, "connect_timeout": TIMEOUT}
"""Clients that do not give up a server which is only slow; one that was killed refuses at once."""

LEASE = 6.0
Pair = tuple[harness.GearmanServerProcess, harness.GearmanServerProcess]


@pytest.fixture
def servers(transactional_db: None, settings: Any) -> Iterator[Pair]:
    env = SITE | {"GEARMAN_TEST_LEASE": str(LEASE)}
    with harness.server(name="one", env=env) as one, harness.server(name="two", env=env) as two:
        settings.GEARMAN = {"default": {"SERVERS": [one.address, two.address]}}
        two.complaints_allowed = True
        with harness.worker([one, two], processes=2, env=SITE) as worker:
            worker.complaints_allowed = True
            worker.wait_connected()
            yield one, two


class Storm:
    """What became of each call."""

    def __init__(self, victim: harness.GearmanServerProcess, trace: str) -> None:
        self._victim = victim
        self._trace = trace
        self._lock = Lock()
        self._calls = 0
        self.acknowledged: set[str] = set()
        self.refused: set[str] = set()
        self.answered = 0
        self.errors: list[GearmanError] = []
        self.longest = 0.0

    def line(self, number: int) -> bytes:
        return json.dumps({"args": [self._trace, f"job {number}"], "kwargs": {}}).encode()

    def begins(self) -> float:
        with self._lock:
            self._calls += 1
            if self._calls == JOBS:  # half of them
                self._victim.kill()
        return time.monotonic()

    def ends(self, began: float) -> None:
        self.longest = max(self.longest, time.monotonic() - began)

    def check(self, *, resubmit: bool) -> None:
        """The promises."""
        assert len(self.acknowledged) + len(self.refused) == JOBS
        assert self.answered + len(self.errors) == JOBS
        # Nobody waited for as long as he would have: whom it concerned was told what happened.
        assert self.longest < TIMEOUT
        assert {type(error) for error in self.errors} <= {ConnectionLost, ConnectionFailed}
        if resubmit:
            assert not self.errors
        # Those that were in flight when it died, and no others.
        assert len(self.errors) <= JOBS // 2
        assert not self.refused, "another server was there for what was not acknowledged"
        harness.wait_until(
            lambda: not JobRecord.objects.filter(status__in=JobRecord.LIVE, background=True).exists(),
            60.0,
            "the end of every background job",
        )
        with open(self._trace) as file:
            runs = Counter(line.rstrip("\n") for line in file)
        assert not self.acknowledged - runs.keys(), "every acknowledged background job ran"


IN_ORDER = pytest.param(False, False, id="in order")
SPREAD = pytest.param(True, True, id="spread, resubmitting")


class TestKilledServer:
    @pytest.mark.parametrize(("spread", "resubmit"), [IN_ORDER, SPREAD])
    def test_client(self, servers: Pair, tmp_path: Any, spread: bool, resubmit: bool) -> None:
        storm = Storm(servers[0], str(tmp_path / "trace"))
        client = Client([each.address for each in servers], spread=spread, **PATIENT)

        def background(number: int) -> None:
            began = storm.begins()
            try:
                client.do_background(append_line.name, storm.line(number))
                storm.acknowledged.add(f"job {number}")
            except GearmanError:
                storm.refused.add(f"job {number}")
            storm.ends(began)

        def foreground(number: int) -> None:
            began = storm.begins()
            text = b"text %d" % number
            try:
                assert client.do("shout", text, timeout=TIMEOUT, resubmit=resubmit) == text.upper()
                with storm._lock:
                    storm.answered += 1
            except GearmanError as error:
                storm.errors.append(error)
            storm.ends(began)

        with client, ThreadPoolExecutor(CALLERS) as pool:
            calls: list[Callable[[int], None]] = [background, foreground]
            list(pool.map(lambda number: calls[number % 2](number // 2), range(2 * JOBS)))
        storm.check(resubmit=resubmit)

    @pytest.mark.parametrize(("spread", "resubmit"), [SPREAD])
    def test_async_client(self, servers: Pair, tmp_path: Any, spread: bool, resubmit: bool) -> None:
        storm = Storm(servers[0], str(tmp_path / "trace"))

        async def background(client: AsyncClient, number: int) -> None:
            began = storm.begins()
            try:
                await client.do_background(append_line.name, storm.line(number))
                storm.acknowledged.add(f"job {number}")
            except GearmanError:
                storm.refused.add(f"job {number}")
            storm.ends(began)

        async def foreground(client: AsyncClient, number: int) -> None:
            began = storm.begins()
            text = b"text %d" % number
            try:
                result = await client.do("shout", text, timeout=TIMEOUT, resubmit=resubmit)
                assert result == text.upper()
                storm.answered += 1
            except GearmanError as error:
                storm.errors.append(error)
            storm.ends(began)

        async def main() -> None:
            addresses = [each.address for each in servers]
            places = asyncio.Semaphore(50)

            async def call(number: int) -> None:
                async with places:
                    await (foreground if number % 2 else background)(client, number // 2)

            async with AsyncClient(addresses, spread=spread, **PATIENT) as client:
                await asyncio.gather(*[call(number) for number in range(2 * JOBS)])

        asyncio.run(main())
        storm.check(resubmit=resubmit)

    @pytest.mark.parametrize(("spread", "resubmit"), [IN_ORDER])
    def test_run_tasks(self, servers: Pair, tmp_path: Any, spread: bool, resubmit: bool) -> None:
        storm = Storm(servers[0], str(tmp_path / "trace"))
        with Client([each.address for each in servers], spread=spread, **PATIENT) as client:
            ended: list[object] = []

            def end(task: object) -> None:
                ended.append(task)
                if len(ended) == JOBS // 2:
                    servers[0].kill()

            background = [
                client.add_task_background(append_line.name, storm.line(number)) for number in range(JOBS)
            ]
            foreground = [
                client.add_task("shout", b"text %d" % number, on_complete=end) for number in range(JOBS)
            ]
            client.run_tasks(timeout=TIMEOUT, resubmit=resubmit)
        for number, task in enumerate(background):
            (storm.refused if task.error else storm.acknowledged).add(f"job {number}")
        for number, task in enumerate(foreground):
            if task.error is not None:
                storm.errors.append(task.error)
            else:
                assert task.result() == b"TEXT %d" % number
                storm.answered += 1
        storm.check(resubmit=resubmit)
