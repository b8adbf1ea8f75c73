"""The page for Prometheus: read by Prometheus's own parser, and asked for over HTTP."""

from __future__ import annotations

import http.client
import re
from collections.abc import Iterator
from math import inf

import pytest
from prometheus_client.parser import text_string_to_metric_families

from django_gearman import Client
from django_gearman.exceptions import StoreError
from django_gearman.protocol.packets import PacketType
from django_gearman.server import metrics
from django_gearman.server.entries import StoredJob
from django_gearman.server.http import MetricsConversation
from django_gearman.server.job_store import MemoryStore
from django_gearman.server.journal import Journal
from django_gearman.server.metrics import Page
from tests import harness

from .harness import Wire

P = PacketType
Samples = dict[tuple[str, tuple[str, ...]], float]


def read(text: str) -> Samples:
    """{(name of the sample, values of its labels): value}, of what must be right in every detail."""
    found: Samples = {}
    names: set[str] = set()
    assert text.endswith("\n")
    for family in text_string_to_metric_families(text):
        assert family.name not in names, "a family comes twice"
        assert family.documentation
        assert family.type in ("gauge", "counter", "histogram")
        names.add(family.name)
        for sample in family.samples:
            key = sample.name.removeprefix("gearman_"), tuple(sample.labels.values())
            assert key not in found, "a sample comes twice"
            found[key] = sample.value
    return found


def page(wire: Wire, journal: Journal | None = None) -> Samples:
    return read(Page(wire.core, journal, 900.0).text().decode())


class TestPage:
    def test_empty_server(self):
        wire = Wire()
        found = page(wire)
        assert found["info", ("0.1.0", "test:1")] == 1
        assert found["start_time_seconds", ()] == 900
        assert found["connections", ()] == found["functions", ()] == 0
        assert not [name for name, _ in found if name.startswith("store")]

    def test_life_of_jobs(self):
        wire = Wire(durable=True, measure=True)
        wire.core.adopt([StoredJob(b"H:%d" % number, b"f", b"", b"", 0, 0, None) for number in range(4)])
        client = wire.connect()
        client(P.SUBMIT_JOB_EPOCH, b"f", b"", b"5000", b"")
        wire.commit()
        client(P.SUBMIT_JOB_BG, b"g", b"", b"")
        worker = wire.worker(b"f")
        wire.core.now += 0.05
        first, second, third = worker.grabs(), worker.grabs(), worker.grabs()
        assert first
        assert second
        assert third
        wire.core.now += 7
        worker(P.WORK_COMPLETE, first, b"")
        worker(P.WORK_FAIL, second)
        found = page(wire)
        states = {
            state: found["jobs", ("f", state)] for state in ("pending", "delayed", "waiting", "running")
        }
        assert states == {"pending": 0, "delayed": 1, "waiting": 1, "running": 1}
        assert found["jobs", ("g", "pending")] == 1
        assert found["jobs_submitted_total", ("f",)] == 5
        assert found["jobs_started_total", ("f",)] == 3
        outcomes = ("successful", "failed", "dead", "cancelled")
        assert [found["jobs_finished_total", ("f", each)] for each in outcomes] == [1, 1, 0, 0]
        assert found["function_workers", ("f",)] == found["workers", ()] == found["workers_busy", ()] == 1
        assert found["connections", ()] == 2
        worker.leaves()
        found = page(wire)
        assert found["jobs_retried_total", ("f",)] == 1
        assert found["jobs", ("f", "waiting")] == 2
        assert found["workers", ()] == 0

    def test_times(self):
        wire = Wire(measure=True)
        client, worker = wire.connect(), wire.worker(b"f")
        for wait, run in ((0.0, 0.5), (0.05, 0.6), (99999.0, 7.0)):
            client(P.SUBMIT_JOB_BG, b"f", b"", b"")
            wire.core.now += wait
            handle = worker.grabs()
            assert handle
            wire.core.now += run
            worker(P.WORK_COMPLETE, handle, b"")
        found = page(wire)
        waits = {key[1][1]: value for key, value in found.items() if key[0] == "job_wait_seconds_bucket"}
        assert waits["0.001"] == waits["0.01"] == 1
        assert waits["0.05"] == waits["3600.0"] == 2
        assert waits["+Inf"] == found["job_wait_seconds_count", ("f",)] == 3
        assert found["job_wait_seconds_sum", ("f",)] == 99999.05
        assert found["job_run_seconds_bucket", ("f", "0.5")] == 1
        assert found["job_run_seconds_bucket", ("f", "1.0")] == 2

    def test_clock_that_was_set_back(self):
        wire = Wire(measure=True)
        wire.connect()(P.SUBMIT_JOB_BG, b"f", b"", b"")
        wire.core.now -= 500
        assert wire.worker(b"f").grabs()
        assert page(wire)["job_wait_seconds_sum", ("f",)] == 0

    def test_times_are_not_measured_unless_wanted(self):
        wire = Wire()
        wire.connect()(P.SUBMIT_JOB_BG, b"f", b"", b"")
        assert wire.worker(b"f").grabs()
        assert not [name for name, _ in page(wire) if name.startswith("job_")]

    @pytest.mark.parametrize("name", ['a"b', "a\\b", "a\\nb", "{}=,", "\u00fc \u2028", "", "#", "a" * 512])
    def test_names_of_strangers(self, name: str):
        wire = Wire()
        wire.connect()(P.SUBMIT_JOB_BG, name.encode(), b"", b"")
        assert page(wire)["jobs", (name, "waiting")] == 1

    def test_functions_without_end(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(metrics, "LISTED", 3)
        wire = Wire()
        client = wire.connect()
        for number in range(5):
            client(P.SUBMIT_JOB_BG, b"f%d" % number, b"", b"")
        found = page(wire)
        assert (found["functions", ()], found["functions_unlisted", ()]) == (5, 2)
        assert ("jobs", ("f2", "waiting")) in found
        assert ("jobs", ("f3", "waiting")) not in found


def test_documentation_has_them_all():
    wire = Wire(measure=True)
    wire.connect()(P.SUBMIT_JOB_BG, b"f", b"", b"")
    worker = wire.worker(b"f")
    handle = worker.grabs()
    assert handle
    worker(P.WORK_COMPLETE, handle, b"")
    text = Page(wire.core, Journal(wire.core), 900.0).text().decode()
    told = set(re.findall(r"^# TYPE (\w+)", text, re.MULTILINE))
    table = (harness.ROOT / "docs" / "monitoring.md").read_text().partition("<!-- table: metrics -->")[2]
    rows = [line.split("|")[1] for line in table.partition("\n\n")[0].splitlines() if line.startswith("| `")]
    assert set(re.findall(r"`(\w+)`", "".join(rows))) == told


class TestStore:
    def test_trips(self):
        wire = Wire(durable=True)
        journal = Journal(wire.core)
        store = MemoryStore()
        client = wire.connect()
        for number in range(3):
            client(P.SUBMIT_JOB_BG, b"f", b"%d" % number, b"")
        journal.append(wire.entries(), 0.0)
        wire.core.now += 4
        found = page(wire, journal)
        assert found["store_lag_seconds", ()] == 4
        assert found["store_backlog_bytes", ()] == 1200
        batch = journal.next_batch(0.0)
        assert batch is not None
        assert page(wire, journal)["store_lag_seconds", ()] == 4
        batch.perform(store)
        journal.done(batch, 0.0)
        found = page(wire, journal)
        assert found["store_lag_seconds", ()] == found["store_backlog_bytes", ()] == 0
        assert found["store_batch_entries_bucket", ("2.0",)] == 0
        assert found["store_batch_entries_bucket", ("5.0",)] == found["store_batch_entries_count", ()] == 1
        assert 0 < found["store_commit_seconds_sum", ()] < 1

    def test_store_that_is_away(self):
        wire = Wire(durable=True)
        journal = Journal(wire.core)
        wire.connect()(P.SUBMIT_JOB_BG, b"f", b"", b"")
        journal.append(wire.entries(), 0.0)
        batch = journal.next_batch(0.0)
        assert batch is not None
        batch.error = StoreError("away")
        journal.done(batch, 0.0)
        wire.core.now += 2
        found = page(wire, journal)
        assert (found["store_failures_total", ()], found["store_lag_seconds", ()]) == (1, 2)


class TestConversation:
    def ask(self, request: bytes, hosts: tuple[str, ...] = ()) -> tuple[int, bytes, bytes]:
        """Status, head and body of the reply to a request."""
        conversation = MetricsConversation(lambda: b"page\n", hosts=hosts)
        conversation.feed(request)
        assert conversation.take() is None
        assert conversation.closed
        head, _, body = b"".join(conversation.output).partition(b"\r\n\r\n")
        return int(head.split()[1]), head, body

    def test_page(self):
        status, head, body = self.ask(b"GET /metrics HTTP/1.1\r\nHost: localhost:9730\r\n\r\n")
        assert (status, body) == (200, b"page\n")
        assert b"Content-Type: text/plain; version=0.0.4; charset=utf-8\r\n" in head
        assert b"Connection: close" in head

    def test_browsers_may_look(self):
        headers = b"Host: 127.0.0.1\r\nUser-Agent: Mozilla/5.0\r\nReferer: http://127.0.0.1/\r\n\r\n"
        assert self.ask(b"GET /metrics?x=1 HTTP/1.1\r\n" + headers)[0] == 200

    def test_head(self):
        assert self.ask(b"HEAD /metrics HTTP/1.0\r\n\r\n")[::2] == (200, b"")

    def test_one_reply_for_each_connection(self):
        request = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"
        assert self.ask(request * 50)[2] == b"page\n"

    @pytest.mark.parametrize(
        ("request_", "status"),
        [
            (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
            (b"GET /metrics/ HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
            (b"POST /metrics HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n", 405),
            (b"GET /metrics HTTP/1.1\r\n\r\n", 400),
            (b"GET /metrics HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", 400),
            (b"GET /metrics HTTP/1.1\r\nHost: evil.example\r\n\r\n", 403),
            (b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\n", 400),
            (b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
            (b"GET /metrics HTTP/2.0\r\n\r\n", 505),
            (b"x" * 9000, 414),
            (b"\0REQ\0\0\0\x01\r\n", 400),
        ],
    )
    def test_what_is_refused(self, request_: bytes, status: int):
        found, head, body = self.ask(request_)
        assert found == status
        assert body
        if status == 405:
            assert head.endswith(b"\r\nAllow: GET, HEAD")

    def test_name_of_the_server(self):
        request = b"GET /metrics HTTP/1.1\r\nHost: Jobs.example:9730\r\n\r\n"
        assert self.ask(request, ("jobs.example",))[0] == 200


@pytest.fixture
def port() -> int:
    return harness.free_port()


@pytest.fixture
def server(transactional_db: None, port: int) -> Iterator[harness.GearmanServerProcess]:
    with harness.server(options=["--metrics-port", str(port)]) as process:
        assert f"for metrics on 127.0.0.1:{port}; " in process.stdout
        yield process


@pytest.mark.acceptance
@pytest.mark.django_db(transaction=True)
def test_process(server: harness.GearmanServerProcess, port: int):
    def scrape() -> Samples:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        try:
            connection.request("GET", "/metrics")
            reply = connection.getresponse()
            assert reply.status == 200
            return read(reply.read().decode())
        finally:
            connection.close()

    assert scrape()["connections", ()] == 1, "the one that asks"
    with Client([server.address], timeout=30) as client:
        handles = [client.do_background("reverse", b"abc") for _ in range(20)]
        assert len(set(handles)) == 20
        found = scrape()
        assert found["jobs", ("reverse", "waiting")] == 20
        with harness.worker_thread({"reverse": lambda job: job.workload[::-1]}, server):
            harness.wait_until(lambda: scrape()["jobs_finished_total", ("reverse", "successful")] == 20)
            harness.wait_until(lambda: scrape()["store_backlog_bytes", ()] == 0)
    found = scrape()
    assert found["job_run_seconds_count", ("reverse",)] == 20
    assert found["store_batch_entries_sum", ()] >= 40
    assert 0 < found["store_commit_seconds_sum", ()] < inf
    assert found["store_lag_seconds", ()] == 0
