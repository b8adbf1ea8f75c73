"""Jobs that are cancelled while they run."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth.models import Permission
from django.db import transaction

from django_gearman import AdminClient, JobResult
from django_gearman.exceptions import ResponseTimeout, ServerError
from django_gearman.models import Cancellation, JobRecord
from tests import harness
from tests.app import jobs

from .conftest import SITE
from .site import pools

Server = harness.GearmanServerProcess
Status = JobRecord.Status

pytestmark = [pytest.mark.acceptance, pytest.mark.django_db(transaction=True)]


@pytest.fixture
def operator(site_server: Server) -> Iterator[AdminClient]:
    client = AdminClient(site_server.address)
    yield client
    client.close()


def wait_for(path: Path) -> None:
    # What begins writes who it is, which comes after the file.
    is_written = path.suffix == ".begun"
    harness.wait_until(lambda: path.exists() and (path.stat().st_size or not is_written), 60.0, path.name)


def cancel(operator: AdminClient, result: JobResult[Any]) -> None:
    result.refresh()
    operator.cancel(result.handle)
    harness.wait_until(lambda: (result.refresh(), result.is_finished)[1])
    assert result.status == Status.CANCELLED


@pytest.mark.parametrize(
    "options", [[], ["--threads", "2"], ["--pool", "solo"]], ids=["process", "threads", "solo"]
)
def test_function_that_looks_ends_by_itself(
    site_server: Server, operator: AdminClient, tmp_path: Path, options: list[str]
):
    with harness.worker(site_server, processes=1, options=options, env=SITE) as worker:
        result = pools.look_at_context.enqueue(str(tmp_path), "job")
        wait_for(tmp_path / "job.begun")
        children = worker.children()
        cancel(operator, result)
        wait_for(tmp_path / "job.cancelled")
        assert jobs.add.enqueue(1).get(timeout=30) == 2
        assert worker.children() == children
        assert "was cancelled" in worker.stderr


def test_function_that_sleeps_is_interrupted(site_server: Server, operator: AdminClient, tmp_path: Path):
    with harness.worker(site_server, processes=1, env=SITE) as worker:
        result = pools.be_interrupted.enqueue(str(tmp_path), "job")
        wait_for(tmp_path / "job.begun")
        children = worker.children()
        cancel(operator, result)
        wait_for(tmp_path / "job.cancelled")
        assert jobs.add.enqueue(1).get(timeout=30) == 2
        assert worker.children() == children


def test_by_its_result_and_by_the_admin(
    site_server: Server, tmp_path: Path, admin_client: Any, settings: Any
):
    settings.ROOT_URLCONF = "tests.admin.urls"
    waiting = pools.sleep_for.using(run_after=timedelta(hours=1)).enqueue(0)
    with harness.worker(site_server, processes=2, env=SITE):
        results = [pools.be_interrupted.enqueue(str(tmp_path), name) for name in ("first", "second")]
        for name in ("first", "second"):
            wait_for(tmp_path / f"{name}.begun")
        assert results[0].cancel()
        assert results[0].status == Status.CANCELLED
        assert not results[0].cancel()
        wait_for(tmp_path / "first.cancelled")
        page = admin_client.post(
            "/admin/django_gearman/jobrecord/",
            {"action": "cancel", "_selected_action": [results[0].id, results[1].id, waiting.id]},
            follow=True,
        )
        assert "2 jobs were cancelled." in page.content.decode()
        wait_for(tmp_path / "second.cancelled")
        waiting.refresh()
        assert waiting.status == Status.CANCELLED


def test_from_a_machine_that_knows_no_server(
    site_server: Server, tmp_path: Path, settings: Any, admin_client: Any
):
    """All that it shares with the job server is the database."""
    with harness.worker(site_server, processes=3, env=SITE):
        results = [pools.be_interrupted.enqueue(str(tmp_path), name) for name in ("first", "second")]
        held = pools.hold.enqueue(str(tmp_path), "held")
        for name in ("first", "second", "held"):
            wait_for(tmp_path / f"{name}.begun")
        settings.GEARMAN = {"default": {"SERVERS": [f"127.0.0.1:{harness.free_port()}"]}}
        settings.ROOT_URLCONF = "tests.admin.urls"
        assert results[0].cancel() is True
        wait_for(tmp_path / "first.cancelled")
        assert results[0].cancel() is False
        page = admin_client.post(
            "/admin/django_gearman/jobrecord/",
            {"action": "cancel", "_selected_action": [result.id for result in results]},
            follow=True,
        )
        assert "1 job was cancelled." in page.content.decode()
        wait_for(tmp_path / "second.cancelled")
        (tmp_path / "go").touch()
        assert held.get(timeout=30)
        results[1].refresh()
        assert [result.status for result in results] == [Status.CANCELLED] * 2
        harness.wait_until(lambda: not Cancellation.objects.exists())


def test_job_of_another_server_than_the_one_that_is_known(site_server: Server, tmp_path: Path, settings: Any):
    with harness.server(env=SITE) as second, harness.worker([site_server, second], processes=1, env=SITE):
        result = pools.be_interrupted.enqueue(str(tmp_path), "job")
        wait_for(tmp_path / "job.begun")
        record = JobRecord.objects.select_related("server").get(pk=result.id)
        assert record.server is not None
        is_seconds = record.server.name.endswith(f":{second.port}")
        settings.GEARMAN = (site_server if is_seconds else second).setting
        assert result.cancel() is True
        wait_for(tmp_path / "job.cancelled")


def test_no_server_is_there(site_server: Server, tmp_path: Path, settings: Any):
    """What was asked for stands, and is done by the server that is back."""
    result = jobs.add.enqueue(1)
    harness.wait_until(lambda: (result.refresh(), result.handle)[1], what="a server's claim")
    site_server.kill()
    settings.GEARMAN = {"default": {"SERVERS": [site_server.address], "TIMEOUT": 0.3}}
    with pytest.raises(ResponseTimeout) as caught:
        result.cancel()
    assert "asked for still" in caught.value.__notes__[0]
    with pytest.raises(ResponseTimeout):
        result.cancel()  # it does no harm to ask twice
    site_server.start()
    harness.wait_until(lambda: (result.refresh(), result.is_finished)[1])
    assert result.status == Status.CANCELLED
    harness.wait_until(lambda: not Cancellation.objects.exists())


def test_in_a_transaction(site_server: Server, tmp_path: Path):
    with harness.worker(site_server, processes=1, env=SITE):
        result = pools.be_interrupted.enqueue(str(tmp_path), "job")
        wait_for(tmp_path / "job.begun")
        with contextlib.suppress(LookupError), transaction.atomic():
            assert result.cancel() is True
            raise LookupError  # it is rolled back, and nothing was asked for
        assert not Cancellation.objects.exists()
        with transaction.atomic():
            mine = jobs.add.enqueue(1)
            assert mine.cancel() is True
            assert mine.status == Status.CANCELLED
            assert result.cancel() is True
        wait_for(tmp_path / "job.cancelled")
        harness.wait_until(lambda: (result.refresh(), result.is_finished)[1])
    assert result.status == Status.CANCELLED


def test_admin_who_may_only_look_cannot_cancel(client: Any, django_user_model: Any, settings: Any):
    settings.ROOT_URLCONF = "tests.admin.urls"
    user = django_user_model.objects.create_user("looker", password="x", is_staff=True)
    user.user_permissions.add(Permission.objects.get(codename="view_jobrecord"))
    client.force_login(user)
    result = jobs.add.enqueue(1)
    page = client.post(
        "/admin/django_gearman/jobrecord/", {"action": "cancel", "_selected_action": [result.id]}, follow=True
    )
    assert "cancelled" not in page.content.decode()
    result.refresh()
    assert result.status == Status.READY


def test_task_is_interrupted(site_server: Server, operator: AdminClient, tmp_path: Path):
    with harness.worker(site_server, processes=1, options=["--concurrency", "3"], env=SITE) as worker:
        results = [pools.hold_task.enqueue(str(tmp_path), f"job{number}") for number in range(3)]
        for number in range(3):
            wait_for(tmp_path / f"job{number}.begun")
        cancel(operator, results[0])
        harness.wait_until(lambda: "was cancelled" in worker.stderr)
        (tmp_path / "go").touch()
        assert [bool(result.get(timeout=30)) for result in results[1:]] == [True, True]


def test_function_that_goes_on_is_killed(site_server: Server, operator: AdminClient, tmp_path: Path):
    with harness.worker(site_server, processes=2, env=SITE) as worker:
        held = pools.hold.enqueue(str(tmp_path), "held")
        result = pools.hang_for_ever.enqueue(str(tmp_path), "job")
        wait_for(tmp_path / "job.begun")
        pid = int((tmp_path / "job.begun").read_text())
        cancel(operator, result)
        harness.wait_until(lambda: not harness.is_running(pid), 60.0, "the end of its process")
        (tmp_path / "go").touch()
        assert held.get(timeout=30)
        assert held.attempts == 1
        assert "its job was cancelled and went on" in worker.stderr
    result.refresh()
    assert (result.status, result.attempts) == (Status.CANCELLED, 1)


def test_at_the_moment_of_its_end_no_other_job_is_hit(
    site_server: Server, operator: AdminClient, tmp_path: Path
):
    """Jobs of no length, cancelled as they run: each ends or is cancelled, and none that was not is hurt."""
    path = tmp_path / "trace"
    with harness.worker(site_server, processes=1, options=["--verbosity", "0"], env=SITE):
        results = [jobs.append_line.enqueue(str(path), str(number)) for number in range(400)]
        victims = results[::2]
        cancelled = set()
        lock = threading.Lock()

        def cancel_some(share: list[JobResult[None]]) -> None:
            client = AdminClient(site_server.address)
            for victim in share:
                try:
                    client.cancel(f"H:{site_server.address}:r{victim.id}")
                except ServerError:
                    continue  # it had ended
                with lock:
                    cancelled.add(victim.id)
            client.close()

        threads = [threading.Thread(target=cancel_some, args=(victims[part::3],)) for part in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result in results:
            harness.wait_until(lambda result=result: (result.refresh(), result.is_finished)[1], 60.0)
    for result in results:
        wanted = Status.CANCELLED if result.id in cancelled else Status.SUCCESSFUL
        assert (result.status, result.attempts <= 1) == (wanted, True)
    lines = path.read_text().split()
    assert len(lines) == len(set(lines))
