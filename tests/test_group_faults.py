"""
A fault at database calls while a group's members end: it is counted truly, and goes on once.

At every tenth call, from one that chance chooses; ``GEARMAN_FAULT_STEP=1`` for each.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator

import pytest

from django_gearman import GroupResult, chain, group
from django_gearman.models import JobGroup, JobRecord
from tests.app.jobs import shout

from .test_faults import (
    Faults,
    Kind,
    World,
    end_and_start,
    faulty_connection,
    look_for_what_is_left_behind,
    play,
    play_all,
)

Status = JobRecord.Status

MEMBERS = [f"member {number}" for number in range(5)]
STEPS = [f"step {number}" for number in range(3)]
FOLLOWING = ["success", "complete", "end of chain"]


class GroupWorld(World):
    """A server, and groups at its door."""

    rounds = 6

    def enqueue(self) -> None:
        made: list[GroupResult[object]] = [
            group(shout.si(name.encode()) for name in MEMBERS).enqueue(
                on_success=shout.si(b"success"), on_complete=shout.si(b"complete")
            ),
            chain(*(shout.si(name.encode()) for name in STEPS)).enqueue(
                on_complete=shout.si(b"end of chain")
            ),
        ]
        assert all(made)
        JobRecord.objects.update(function="f")
        self.acknowledged |= {*MEMBERS, *STEPS, *FOLLOWING}
        self.journal.claim_soon()

    def check(self) -> None:
        super().check()
        rows = self.rows()
        for row in JobGroup.objects.all():
            names = MEMBERS if row.name.startswith("5") else STEPS
            following = FOLLOWING[:2] if names is MEMBERS else FOLLOWING[2:]
            ended = [rows[name].status for name in names if rows[name].is_finished]
            assert row.finished == len(ended), "it was miscounted"
            assert row.successful == ended.count(Status.SUCCESSFUL)
            assert row.is_finished == (len(ended) == len(names)), "it did not go on with its last member"
            for name in following:
                waits = rows[name].status == Status.WAITING
                assert waits != row.is_finished, f"{name} was let go at a wrong moment"

    def check_end(self, kind: Kind | None) -> None:
        rows = self.rows()
        assert set(rows) == self.acknowledged
        for name, row in rows.items():
            assert (row.status, bytes(row.result or b"")) == self.reported[name]
        if kind is None or not kind.crashes:
            again = {name for name, count in self.handed_out.items() if count > 1}
            assert again <= self.left, f"ran more often than their workers left: {again}"


SCENARIO: tuple[Callable[[GroupWorld], None], ...] = (
    GroupWorld.enqueue,
    World.turn,
    lambda world: world.work(limit=2),
    World.turn,
    lambda world: world.work(limit=1, leave=True),
    lambda world: world.pass_time(1.0),
    World.turn,
    lambda world: world.work(limit=3),
    World.settle,
    look_for_what_is_left_behind,
    World.work,
    World.settle,
    end_and_start,
    World.settle,
    World.work,
    World.settle,
)


def play_scenario(faults: Faults, kind: Kind | None, number: int) -> GroupWorld:
    return play(GroupWorld, SCENARIO, faults, kind, number)


@pytest.fixture
def faults(transactional_db: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    yield from faulty_connection(monkeypatch)


def test_without_a_fault(faults: Faults) -> None:
    world = play_scenario(faults, None, 0)
    assert world.left
    assert set(world.handed_out) == {*MEMBERS, *STEPS, *FOLLOWING}


@pytest.mark.parametrize(
    "name", ["error after", "answer lost", "away for a moment", "crash before", "crash after"]
)
def test_fault_at_every_call(faults: Faults, name: str) -> None:
    step = int(os.environ.get("GEARMAN_FAULT_STEP", "10"))
    play_all(faults, name, play_scenario, random.randrange(step), step)
