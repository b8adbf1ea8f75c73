"""
Views that enqueue and run jobs in eight preloaded web processes while job servers come and go.

``GEARMAN_STORM`` says how many requests there are; the promise was tried with 10000.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any
from urllib.error import HTTPError

import pytest

from django_gearman.models import JobRecord
from tests import harness
from tests.app.jobs import add

from .conftest import SITE
from .test_gunicorn import Gunicorn

pytestmark = [pytest.mark.acceptance, pytest.mark.django_db(transaction=True)]

REQUESTS = int(os.environ.get("GEARMAN_STORM", "600"))
CALLERS = 24
LONGEST = 12.0
"""Seconds that nearly every view takes less than, with one server away at any time."""

Pair = tuple[harness.GearmanServerProcess, harness.GearmanServerProcess]


@pytest.fixture
def servers(transactional_db: None, settings: Any) -> Iterator[Pair]:
    with harness.server(name="one", env=SITE) as one, harness.server(name="two", env=SITE) as two:
        settings.GEARMAN = {"default": {"SERVERS": [one.address, two.address]}}
        for each in (one, two):
            each.complaints_allowed = True
        yield one, two


class Bouncer:
    """
    Kills or restarts one server after the other; one of them always runs.

    Args:
        under_way: The calls that are; the next server waits for those that the one before has hit.
    """

    def __init__(self, servers: Pair, under_way: Callable[[], set[int]]) -> None:
        self._servers = servers
        self._under_way = under_way
        self._enough = Event()
        self._failures: list[BaseException] = []
        self.bounces = 0
        self._thread = Thread(target=self._bounce)

    def _bounce(self) -> None:
        try:
            while not self._enough.wait(0.3):
                server = self._servers[self.bounces % 2]
                if self.bounces % 3:
                    server.stop()
                else:
                    server.kill()
                server.start()
                self.bounces += 1
                # However slow the machine is, no call sees more of them than a client puts up with.
                hit = self._under_way()
                harness.wait_until(lambda hit=hit: not hit & self._under_way(), 90.0, "calls that go on")
        except BaseException as error:
            self._failures.append(error)

    def __enter__(self) -> Bouncer:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._enough.set()
        self._thread.join(120)
        assert not self._failures, self._failures


@pytest.mark.timeout(900)
def test_views_do_not_notice(servers: Pair, tmp_path: Path) -> None:
    lock = Lock()
    ids: dict[str, int] = {}
    pids: set[int] = set()
    taken: list[float] = []
    calls: set[int] = set()

    def under_way() -> set[int]:
        with lock:
            return set(calls)

    def call(number: int) -> None:
        with lock:
            calls.add(number)
        try:
            make(number)
        finally:
            with lock:
                calls.discard(number)

    def make(number: int) -> None:
        began = time.monotonic()
        if number % 2:
            try:
                answer = gunicorn.get("insist", text=f"text {number} ü")
            except HTTPError as error:
                raise AssertionError(error.read().decode()) from error
            assert answer["answer"] == f"TEXT {number} ü"
        else:
            answer = gunicorn.get("enqueue", left=number)
            assert answer["left"] == number
            with lock:
                ids[answer["id"]] = number
        with lock:
            pids.add(answer["pid"])
            taken.append(time.monotonic() - began)

    with (
        harness.worker(servers, processes=2, env=SITE) as worker,
        Gunicorn(*servers, folder=tmp_path, preload=True, workers=8) as gunicorn,
    ):
        worker.complaints_allowed = True
        with Bouncer(servers, under_way) as bouncer, ThreadPoolExecutor(CALLERS) as pool:
            list(pool.map(call, range(REQUESTS)))
            # However fast they were.
            harness.wait_until(lambda: bouncer.bounces >= 2, 60.0, "two bounces")
        assert len(ids) == REQUESTS // 2
        records = JobRecord.objects.filter(function=add.name)
        harness.wait_until(
            lambda: not records.filter(status__in=JobRecord.LIVE).exists(), 120.0, "the end of every job"
        )
        for id, number in ids.items():
            assert add.get_result(id).return_value == number + 1
    taken.sort()
    median, late, longest = (taken[min(int(len(taken) * part), len(taken) - 1)] for part in (0.5, 0.9, 1.0))
    print(
        f"{REQUESTS} requests, {bouncer.bounces} bounces: {median:.3f} s, 90 %: {late:.3f} s, {longest:.3f} s"
    )
    assert late < LONGEST
    assert len(pids) == 8
