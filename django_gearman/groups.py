"""
Jobs that are gone about together: ``group`` and ``chain``.

Run now, they are foreground jobs side by side, of any Gearman server. Enqueued,
they are rows like all others, with a ``JobGroup`` that counts their ends; what
follows from those is in ``continuations.py``, what is seen of them in ``group_results.py``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from itertools import pairwise
from time import monotonic
from typing import Any, Generic, TypeVar, cast, overload

from asgiref.sync import sync_to_async
from django.db import transaction
from django.utils import timezone

from . import conf, continuations, jobs, rows, signals, tracing
from .client.tasks import Task, deadline_in
from .continuations import Plan, Stage
from .encoding import dumps, refuse_unless_json
from .exceptions import (
    ConnectionFailed,
    GearmanError,
    GroupFailed,
    GroupTimedOut,
    InvalidGroup,
    JobFailed,
    ResponseTimeout,
    TooLarge,
)
from .group_results import GroupResult
from .insertion import insert_workloads
from .jobs import Job, Signature
from .models import JobGroup, JobRecord, unique_key_of
from .registry import registry
from .results import JobResult, one_of_many
from .submission import (
    async_client_for,
    identity,
    insert_unless_there,
    nudge_after_commit,
    off_the_loop,
    waiting_client,
)

T = TypeVar("T")
R = TypeVar("R")
V = TypeVar("V")


# Put together.


class group(Generic[R]):  # a function, to who uses it
    """
    Calls that run side by side: ``group(resize.s(1), resize.s(2))``, or of any iterable of them.

    Each with its own arguments alone, unless the group is a step of a chain.
    """

    @overload
    def __init__(self, members: Iterable[Signature[R]], /) -> None: ...
    @overload
    def __init__(self, *members: Signature[R]) -> None: ...
    def __init__(self, *members: Any) -> None:
        if len(members) == 1 and _is_many(members[0]):
            (members,) = members
        self.members: tuple[Signature[R], ...] = tuple(members)
        for member in self.members:
            if not isinstance(member, Signature):
                raise InvalidGroup(
                    "a member of a group is a call of a job, such as resize.s(1), "
                    f"not {_told(member, 'group')}"
                )

    def __repr__(self) -> str:
        return f"<group of {self}>"

    def __str__(self) -> str:
        return _names(self.members)

    def __len__(self) -> int:
        return len(self.members)

    def run(self, *, timeout: float | None = None) -> list[R]:
        """
        Run all of them now, side by side, and wait for their values, in the members' order.

        Args:
            timeout: Seconds for all of them; by default the longest of theirs, which is ``RUN_TIMEOUT``.
        Raises:
            GroupFailed: A member failed; raised when all have ended, and tells of all.
            GroupTimedOut: The time was up for some, and the others ended well; also a ``ResponseTimeout``.
            InvalidCall: A member has an option that is for later, such as ``run_after``.
            ConnectionFailed: No job server answers; no member was submitted.
        """
        return self._run(timeout, ())

    def _run(self, timeout: float | None, value: tuple[Any, ...]) -> list[R]:
        client = waiting_client()
        prepared, most = self._prepared(value)
        tasks = _added(client, prepared)
        client.run_tasks(timeout=most if timeout is None else timeout)
        return self._gathered(tasks)

    async def arun(self, *, timeout: float | None = None) -> list[R]:
        """As ``run``, on asyncio."""
        return await self._arun(timeout, ())

    async def _arun(self, timeout: float | None, value: tuple[Any, ...]) -> list[R]:
        client = async_client_for()
        prepared, most = self._prepared(value)
        tasks = _added(client, prepared)
        await client.run_tasks(timeout=most if timeout is None else timeout)
        return self._gathered(tasks)

    def _prepared(self, value: tuple[Any, ...]) -> tuple[list[tuple[Job[Any, Any], bytes, str]], float]:
        """Job, workload and unique of each, and the seconds that they may take."""
        prepared, most = [], 0.0
        for member in self.members:
            workload, unique, timeout = member.job._prepared(_with(member, value), member.kwargs)
            prepared.append((member.job, workload, unique))
            most = max(most, timeout)
        return prepared, most

    def _gathered(self, tasks: list[Task]) -> list[R]:
        outcomes: list[Any] = []
        failed: list[int] = []
        for index, (member, task) in enumerate(zip(self.members, tasks, strict=True)):
            error = task.error
            if error is None:
                outcomes.append(member.job._value_of(task.data))
                continue
            outcomes.append(member.job._as_told(error) if isinstance(error, JobFailed) else error)
            failed.append(index)
        if failed and all(isinstance(outcome, ConnectionFailed) for outcome in outcomes):
            raise outcomes[0]
        if failed:
            # A failure says more than that there was no time for others.
            first = next((i for i in failed if not isinstance(outcomes[i], ResponseTimeout)), failed[0])
            kind = GroupTimedOut if isinstance(outcomes[first], ResponseTimeout) else GroupFailed
            raise kind(first, self.members[first].job.name, outcomes[first], outcomes)
        return outcomes

    def enqueue(
        self, *, on_success: Signature[Any] | None = None, on_complete: Signature[Any] | None = None
    ) -> GroupResult[list[R]]:
        """
        Have all of them run by workers, and what follows when all have ended.

        All are rows of the database, inserted here: they exist exactly if the
        current transaction commits. Each of the two that follow runs once, whatever
        dies meanwhile.

        Args:
            on_success: Runs when every member has succeeded. Of ``.s`` the first argument is the list of
                their values, in order, which its worker reads; of ``.si`` there is none.
            on_complete: Runs when all have ended, however. It gets none of their values; with
                ``takes_context`` it finds them, as ``on_success`` does, in ``context.group``.
        Raises:
            InvalidGroup: A member's unique is another job's, or ``ENQUEUE`` is ``"wire"``.
            TypeError: Arguments do not fit a function.
        """
        with off_the_loop:
            return _enqueue([self], on_success, on_complete)

    async def aenqueue(
        self, *, on_success: Signature[Any] | None = None, on_complete: Signature[Any] | None = None
    ) -> GroupResult[list[R]]:
        """As ``enqueue``, in the thread of Django's other database calls."""
        return await sync_to_async(self.enqueue)(on_success=on_success, on_complete=on_complete)


class chain(Generic[V]):
    """
    Calls that run one after the other: ``chain(fetch.s(url), parse.s(), store.si(7))``.

    Each ``.s`` gets the value of the one before as its first argument, ahead of
    its own; ``.si`` gets nothing. A step may be a ``group``: its value is the
    list of its members' values. A failure ends the chain.
    """

    @overload
    def __init__(self, last: Signature[V], /) -> None: ...
    @overload
    def __init__(self, a: Signature[Any] | group[Any], last: Signature[V], /) -> None: ...
    @overload
    def __init__(
        self, a: Signature[Any] | group[Any], b: Signature[Any] | group[Any], last: Signature[V], /
    ) -> None: ...
    @overload
    def __init__(
        self,
        a: Signature[Any] | group[Any],
        b: Signature[Any] | group[Any],
        c: Signature[Any] | group[Any],
        last: Signature[V],
        /,
    ) -> None: ...
    @overload
    def __init__(self: chain[Any], *steps: Signature[Any] | group[Any]) -> None: ...
    def __init__(self, *steps: Any) -> None:
        self.steps: tuple[Signature[Any] | group[Any], ...] = steps
        if not steps:
            raise InvalidGroup("a chain has at least one step")
        for step in steps:
            if not isinstance(step, Signature | group):
                raise InvalidGroup(
                    "a step of a chain is a call of a job, such as resize.s(1), or a group of them, "
                    f"not {_told(step, 'chain')}"
                )
        for before, step in pairwise(steps):
            for member in _members(step):
                _refuse_misfit(member, before)

    def __repr__(self) -> str:
        return f"<chain of {self}>"

    def __str__(self) -> str:
        return " | ".join(_names(_members(step)) for step in self.steps)

    def run(self, *, timeout: float | None = None) -> V:
        """
        Run one after the other now, and wait for the last one's value.

        Args:
            timeout: Seconds for all of them; each has its own by default.
        Raises:
            JobFailed, GroupFailed: A step failed; a note says which.
        """
        deadline = deadline_in(timeout)
        value: tuple[Any, ...] = ()
        for number, step in enumerate(self.steps):
            with _noted(self, number):
                left = _left(deadline, timeout)
                if isinstance(step, group):
                    value = (step._run(left, value),)
                else:
                    job = step.job if left is None else _in_time(step.job, left)
                    value = (job.run(*_with(step, value), **step.kwargs),)
        return cast(V, value[0])

    async def arun(self, *, timeout: float | None = None) -> V:
        """As ``run``, on asyncio."""
        deadline = deadline_in(timeout)
        value: tuple[Any, ...] = ()
        for number, step in enumerate(self.steps):
            with _noted(self, number):
                left = _left(deadline, timeout)
                if isinstance(step, group):
                    value = (await step._arun(left, value),)
                else:
                    job = step.job if left is None else _in_time(step.job, left)
                    value = (await job.arun(*_with(step, value), **step.kwargs),)
        return cast(V, value[0])

    def enqueue(
        self, *, on_success: Signature[Any] | None = None, on_complete: Signature[Any] | None = None
    ) -> GroupResult[V]:
        """
        Have them run by workers, each after the one before, and what follows at the end.

        All are rows from the beginning; the next is let go in the transaction that
        writes the end of the one before.

        Args:
            on_success: Runs when the last has succeeded; ``.s`` gets its value.
            on_complete: Runs when the last has, or one has failed; gets no value.
        Raises:
            As ``group.enqueue``.
        """
        with off_the_loop:
            return _enqueue(self.steps, on_success, on_complete)

    async def aenqueue(
        self, *, on_success: Signature[Any] | None = None, on_complete: Signature[Any] | None = None
    ) -> GroupResult[V]:
        """As ``enqueue``, in the thread of Django's other database calls."""
        return await sync_to_async(self.enqueue)(on_success=on_success, on_complete=on_complete)


Step = Signature[Any] | group[Any]


class _noted:
    """Adds to an error which step of a chain it came from."""

    def __init__(self, of: chain[Any], number: int) -> None:
        self._said = f"In step {number + 1} of {len(of.steps)} of the chain: {of.steps[number]}"

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, GearmanError):
            error.add_note(self._said)


def _left(deadline: float | None, timeout: float | None) -> float | None:
    if deadline is None or timeout is None:
        return None
    left = deadline - monotonic()
    if left <= 0:
        raise ResponseTimeout("the chain", timeout)
    return left


def _in_time(job: Job[Any, Any], left: float) -> Job[Any, Any]:
    own = job.run_timeout
    return job.using(run_timeout=left if own is None else min(own, left))


def _members(step: Step) -> Sequence[Signature[Any]]:
    return step.members if isinstance(step, group) else (step,)


def _with(member: Signature[Any], value: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a call, with the value of what came before if it takes one."""
    if not value or not member.takes_result:
        return member.args
    if member.job.raw:
        return (value[0] if isinstance(value[0], bytes) else dumps(value[0]),)
    return (*value, *member.args)


def _added(client: Any, prepared: Sequence[tuple[Job[Any, Any], bytes, str]]) -> list[Task]:
    """Tasks for the client's ``run_tasks``."""
    add: dict[str, Callable[..., Task]] = {
        "high": client.add_task_high,
        "normal": client.add_task,
        "low": client.add_task_low,
    }
    tasks = []
    try:
        for job, workload, unique in prepared:
            task = add[job._wire_priority](job.name, workload, unique=unique)
            task.resubmit = job.resubmit
            tasks.append(task)
    except BaseException:
        # The next group would run what was added.
        client._take_added({})
        raise
    return tasks


def _is_many(thing: object) -> bool:
    return isinstance(thing, Iterable) and not isinstance(thing, str | bytes | group | chain)


def _told(thing: object, of: str) -> str:
    """
    What somebody took for a call of a job, and what to write instead.

    Args:
        of: What it was to be a part of, such as ``group``; empty where it can be one call alone.
    """
    if isinstance(thing, chain):
        return f"a chain; write {of}(*its.steps, ...)" if of == "chain" else "a chain, whose steps are calls"
    if isinstance(thing, group):
        return f"a group; write {of}(*its.members, ...)" if of else "a group, whose members are calls"
    if _is_many(thing):
        return f"a {type(thing).__name__}" + (f"; write {of}(*calls)" if of else " of them")
    return jobs.told(thing)


def _names(members: Sequence[Signature[Any]]) -> str:
    counts: dict[str, int] = {}
    for member in members:
        name = member.job.name.rpartition(".")[2]
        counts[name] = counts.get(name, 0) + 1
    return ", ".join(f"{count} {name}" if count > 1 else name for name, count in counts.items()) or "nothing"


def _refuse_misfit(member: Signature[Any], before: Step) -> None:
    """Raise for a call that cannot take the value of what comes before it."""
    if not member.takes_result:
        return
    job, is_list = member.job, isinstance(before, group)
    if job.raw:
        if member.args:
            raise InvalidGroup(
                f"{job.name} is raw: the result of the one before is all that it gets; write .s() or .si(...)"
            )
        if is_list:
            raise InvalidGroup(
                f"{job.name} is raw, and cannot take the list of a group's values; write .si(...)"
            )
        return
    if not is_list and _members(before)[0].job.raw:
        raise InvalidGroup(
            f"{job.name} cannot take the bytes that the raw job {_members(before)[0].job.name} returns, "
            "which are not JSON; write .si(...), or make it raw"
        )
    job._bind((None, *member.args), member.kwargs)


# Enqueued.

_Before = tuple[Step, int] | None
"""The stage before, and the place of its first member; None for the first stage."""


def _is_free(job: Job[Any, Any]) -> bool:
    """Whether its submissions have nothing of their own but a workload: no unique, and no key of a limit."""
    given = job.unique
    return job.limit_key is None and (given is None or (isinstance(given, jobs._Always) and not given.unique))


def _enqueue(
    steps: Sequence[Step], on_success: Signature[Any] | None, on_complete: Signature[Any] | None
) -> GroupResult[Any]:
    options = conf.settings_for()
    if options.enqueue == "wire":
        raise InvalidGroup(
            "nobody would count the members of a group with ENQUEUE = 'wire', which hands jobs to a server "
            "that keeps no records; wait for them with run(), or use our own server and ENQUEUE = 'database'"
        )
    for name, following in (("on_success", on_success), ("on_complete", on_complete)):
        if following is not None and not isinstance(following, Signature):
            raise InvalidGroup(f"{name} is one call of a job, such as tell.si(7), not {_told(following, '')}")
    if on_success is not None:
        _refuse_misfit(on_success, steps[-1])
    return _Insertion(steps, options).insert(on_success, on_complete)


class _Insertion:
    """The rows of a group, on their way into the table."""

    def __init__(self, steps: Sequence[Step], options: conf.GearmanSettings) -> None:
        self._steps = steps
        self._options = options
        self._using = options.database
        self._plan: Plan = {"stages": [], "on_success": continuations.TAKES_NOTHING, "delays": {}}
        self._told: list[tuple[Job[Any, Any], JobResult[Any]]] = []
        self._group_id = 0

    def insert(
        self, on_success: Signature[Any] | None, on_complete: Signature[Any] | None
    ) -> GroupResult[Any]:
        sizes = [len(_members(step)) for step in self._steps]
        made = JobGroup(
            name=" | ".join(_names(_members(step)) for step in self._steps)[:200],
            total=sum(sizes),
            left=sizes[0],
        )
        with transaction.atomic(using=self._using):
            made.save(using=self._using, force_insert=True)
            self._group_id = made.pk
            place, before = 0, None
            for step in self._steps:
                self._insert_stage(step, place, before)
                before = (step, place)
                place += len(_members(step))
            assert before is not None, "a step at least"
            if on_success is not None:
                self._plan["on_success"] = self._takes(on_success, before[0])
                made.on_success = self._insert_following("on_success", on_success, before)
            if on_complete is not None:
                made.on_complete = self._insert_following("on_complete", on_complete, None)
            made.plan = self._plan
            made.save(using=self._using, update_fields=["plan", "on_success", "on_complete"])
            if not made.left:
                continuations.begin(made, self._using, self._options.max_packet)
            nudge_after_commit(self._using)
        for job, result in self._told:
            job._enqueued(result)
        return GroupResult(made)

    def _insert_stage(self, step: Step, first: int, before: _Before) -> None:
        """Insert the members of one stage: together what differs in its arguments alone."""
        alike: dict[Any, list[tuple[int, Signature[Any]]]] = {}
        letters = []
        for place, member in enumerate(_members(step), first):
            letters.append(self._takes(member, before and before[0]))
            job = member.job
            kind = job.name, job.priority, job.run_after, _is_free(job) or id(job.unique)
            alike.setdefault(kind, []).append((place, member))
        same = len(set(letters)) <= 1
        stage: Stage = {
            "size": len(letters),
            "many": isinstance(step, group),
            "takes": "".join(letters[:1] if same else letters) or continuations.TAKES_NOTHING,
        }
        self._plan["stages"].append(stage)
        for members in alike.values():
            self._insert_alike(members, before)

    def _takes(self, member: Signature[Any], before: Step | None) -> str:
        """What a call takes of the stage before when it is let go; a list is read by its worker."""
        if before is None or not member.takes_result or isinstance(before, group):
            return continuations.TAKES_NOTHING
        return continuations.TAKES_BYTES if member.job.raw else continuations.TAKES_JSON

    def _insert_alike(self, members: list[tuple[int, Signature[Any]]], before: _Before) -> None:
        """Insert members of one job."""
        job = members[0][1].job
        if not _is_free(job):
            for place, member in members:
                record = self._record(member, before, str(place), waits=before is not None)
                record.group_index = place
                self._insert_one(job, record, f"member {place}, {member}")
            return
        if before is None:
            pairs = [(member.args, member.kwargs) for _, member in members]
            workloads = job._encode_many(cast(Any, pairs), self._options.max_packet)
        else:
            workloads = [self._workload(member, before) for _, member in members]
        template = self._record(members[0][1], before, str(members[0][0]), waits=before is not None)
        for place, _ in members[1:]:
            self._delay(job, str(place), template)
        places = [place for place, _ in members]
        ids = insert_workloads(template, workloads, self._using, places)
        template._state.adding, template._state.db = False, self._using
        if signals.job_enqueued.has_listeners(registry.get(job.name, job)):
            self._told += [
                (job, one_of_many(template, id, workload))
                for id, workload in zip(ids, workloads, strict=True)
            ]

    def _insert_following(self, name: str, following: Signature[Any], before: _Before) -> int:
        """Insert what is run at the end; its id."""
        record = self._record(following, before, name, waits=True)
        self._insert_one(following.job, record, f"{name}={following}")
        return int(record.pk)

    def _record(self, member: Signature[Any], before: _Before, name: str, *, waits: bool) -> JobRecord:
        """The row of a member or of what follows; with ``before``, it may take what that returned."""
        job = member.job
        unique = self._unique(member, before)
        workload = self._workload(member, before, traced=unique != "-")
        now = timezone.now()
        run_after = now + job.run_after if isinstance(job.run_after, timedelta) else job.run_after
        is_later = run_after is not None and run_after > now
        record = JobRecord(
            function=job.name,
            queue_name=job.queue_name,
            workload=workload,
            unique=unique,
            unique_key=unique_key_of(job.name, unique, workload),
            priority=job.priority,
            client=identity(os.getpid()),
            run_after=run_after,
            max_attempts=job.max_attempts,
            limit_key=self._limit_key(member, before),
            timeout=job.timeout or self._options.job_timeout,
            status=JobRecord.Status.SCHEDULED if is_later else JobRecord.Status.READY,
            enqueued_at=now,
            group_id=self._group_id,
        )
        if waits:
            record.status = JobRecord.Status.WAITING
            self._delay(job, name, record)
        return record

    def _delay(self, job: Job[Any, Any], name: str, record: JobRecord) -> None:
        """A time to wait, rather than a moment, begins when the job is let go."""
        if record.status == JobRecord.Status.WAITING and isinstance(job.run_after, timedelta):
            record.run_after = None
            self._plan["delays"][name] = job.run_after.total_seconds()

    def _workload(self, member: Signature[Any], before: _Before, *, traced: bool = True) -> bytes:
        job, limit = member.job, self._options.max_packet
        if before is None or not member.takes_result:
            return job._encode(member.args, member.kwargs, limit, traced=traced)
        if job.raw:
            return b""
        step, place = before
        for name, value in job._bind((None, *member.args), member.kwargs).items():
            refuse_unless_json(value, f"argument {name!r} of {job.name}")
        envelope: dict[str, Any] = {"args": member.args, "kwargs": member.kwargs}
        if isinstance(step, group):
            envelope[continuations.RESULTS] = [self._group_id, place, len(step)]
        if traced and (trace := tracing.current()):
            envelope[tracing.KEY] = trace
        workload = dumps(envelope)
        if len(workload) > limit:
            raise TooLarge(f"the workload of {job.name}", len(workload), limit, setting="MAX_PACKET")
        return workload

    def _unique(self, member: Signature[Any], before: _Before) -> str:
        job = member.job
        if before is not None and member.takes_result and job.unique is not None:
            if not isinstance(job.unique, jobs._Always):
                raise InvalidGroup(
                    f"the unique of {job.name} is made of its arguments, and the first is not known before "
                    "the job before it has ended; give it one, or none: "
                    f'{job.name.rpartition(".")[2]}.using(unique="").s(...)'
                )
            return job._unique_of((), {})
        return job._unique_of(member.args, member.kwargs)

    def _limit_key(self, member: Signature[Any], before: _Before) -> str | None:
        job = member.job
        if before is None or not member.takes_result or job.limit_key is None:
            return job._limit_key_of(member.args, member.kwargs)
        given = job.limit_key
        names = () if callable(given) else (given,) if isinstance(given, str) else tuple(given)
        first = next(iter(job._bind((None, *member.args), member.kwargs)))
        if not names or first in names:
            raise InvalidGroup(
                f"the limit_key of {job.name} may be made of its first argument, which is not known "
                "before the job before it has ended; name others, or write .si(...)"
            )
        return job._limit_key_of((None, *member.args), member.kwargs)

    def _insert_one(self, job: Job[Any, Any], record: JobRecord, what: str) -> None:
        if record.unique_key is None:
            rows.insert(record, self._using)
        else:
            found = insert_unless_there(record, self._using)
            if found is not None and found.group_id == self._group_id:
                other = "what follows it" if found.group_index is None else f"member {found.group_index}"
                raise InvalidGroup(
                    f"{what}: {other} of the same group has its unique {record.unique!r} already, and each "
                    'member counts; leave one out, or give it none: .using(unique="").s(...)'
                )
            if found is not None:
                raise InvalidGroup(
                    f"{what}: there is a job with its unique {record.unique!r} already, {found.pk}, and a "
                    'group counts jobs of its own; leave it out, or give it none: .using(unique="").s(...)'
                )
        self._told.append((job, JobResult(record)))
