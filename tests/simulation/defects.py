"""
Mistakes that the simulation must find: each is a promise broken on purpose.

A defect is an edit of one source file, made while it is imported, in a process
of its own. An edit whose text is no longer there is an error: the code has
changed, and the defect has to follow.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from typing import Final

CORE: Final = "django_gearman.server.core"
CREWS: Final = "django_gearman.server.crews"
JOBS: Final = "django_gearman.server.jobs"
LIMITS: Final = "django_gearman.server.limits"
JOURNAL: Final = "django_gearman.server.journal"
WINDOW: Final = "django_gearman.server.window"
PERMITS: Final = "django_gearman.permits"
RESULTS: Final = "django_gearman.server.results"
SUBMISSIONS: Final = "django_gearman.server.submissions"
STORE: Final = "tests.simulation.store"


@dataclass(frozen=True)
class Defect:
    name: str
    module: str
    old: str
    new: str


class CannotApply(Exception):
    """The code is not what the defect knows."""


DEFECTS: Final = [
    Defect(
        "acknowledged before the commit",
        SUBMISSIONS,
        "            server.urgent = True\n            server.answer_later(peer, job)\n            return\n",
        "            server.urgent = True\n            job.answers = []\n"
        "            server.send(peer, encode_response(PacketType.JOB_CREATED, handle))\n"
        "            return\n",
    ),
    Defect(
        "answers overtake one that waits",
        CORE,
        "        if peer.line is not None:\n            peer.line.append(data)\n"
        "            peer.lined += len(data)\n            return\n",
        "",
    ),
    Defect(
        "wake-up lost with the worker that was woken",
        CORE,
        "function is not taken and function.waiting:\n            self.wake(function)",
        "function is not taken and function.waiting:\n            pass",
    ),
    Defect(
        "no worker is woken for a new job",
        CORE,
        "            for _ in range(min(self.options.worker_wakeup or count, count)):\n",
        "            for _ in ():\n",
    ),
    Defect(
        "worker that waits is woken for nothing",
        CORE,
        "            self._grab_job_uniq(peer, [])\n        else:\n",
        "            pass\n        else:\n",
    ),
    Defect(
        "worker that waits stays awake where it got nothing",
        CORE,
        "            peer.woken_for = None\n            self._pre_sleep(peer, [])\n",
        "            peer.woken_for = None\n",
    ),
    Defect(
        "job handed to a worker that has given back all",
        CORE,
        "            peer.waits = peer.asleep = False\n",
        "            pass\n",
    ),
    Defect(
        "job handed to two workers",
        JOBS,
        "        return self.levels[priority].popleft()",
        "        return self.levels[priority][0]",
    ),
    Defect(
        "first job of a priority goes last",
        JOBS,
        "        return self.levels[priority].popleft()",
        "        while self.levels[priority][-1].state is not JobState.READY:\n"
        "            self.levels[priority].pop()\n"
        "        return self.levels[priority].pop()",
    ),
    Defect(
        "lost worker's job goes to the end of its queue",
        CORE,
        "            function.put_back(job)",
        "            function.put(job)",
    ),
    Defect(
        "results taken from any worker",
        RESULTS,
        "        job = peer.running.get(arguments[0])\n        if job is None:\n"
        '            self._refuse(peer, arguments[0], b"Job given in work result not found")\n'
        "            return\n        server.tell(job, PacketType.WORK_COMPLETE, arguments)",
        "        job = server.jobs.get(arguments[0])\n        if job is None:\n"
        '            self._refuse(peer, arguments[0], b"Job given in work result not found")\n'
        "            return\n        server.tell(job, PacketType.WORK_COMPLETE, arguments)",
    ),
    Defect(
        "unique not freed at the end",
        CORE,
        "            del function.uniques[job.key]\n            job.key = None",
        "            pass",
    ),
    Defect(
        "unique not freed in the store",
        STORE,
        "            del self.keys[row.key]\n",
        "",
    ),
    Defect(
        "one attempt too many",
        CORE,
        "        elif limit and job.attempts - job.interruptions >= limit:",
        "        elif limit and job.attempts - job.interruptions > limit:",
    ),
    Defect(
        "interruptions counted as attempts",
        CORE,
        "        elif limit and job.attempts - job.interruptions >= limit:",
        "        elif limit and job.attempts >= limit:",
    ),
    Defect(
        "attempts not written",
        CORE,
        "            self.entries.append(JobStarted(job.handle, peer.identity, job.attempts, self.now))\n"
        "        return job\n",
        "            pass\n        return job\n",
    ),
    Defect(
        "time of a later job not kept",
        SUBMISSIONS,
        "            job.due,\n            job.spilled,\n",
        "            0.0,\n            job.spilled,\n",
    ),
    Defect(
        "late job ready a second early",
        CORE,
        "        while delayed and delayed[0][0] <= self.now:",
        "        while delayed and delayed[0][0] <= self.now + 1:",
    ),
    Defect(
        "late refusal not undone",
        JOURNAL,
        '        return JobFinished(entry.handle, Outcome.CANCELLED, b"", OUT_OF_REACH, server.now)',
        "        return JobDue(entry.handle)",
    ),
    Defect(
        "late refusal undone though others joined",
        JOURNAL,
        "        if has_key(entry.unique, entry.workload):\n            # Another",
        "        if not entry.unique and has_key(entry.unique, entry.workload):\n            # Another",
    ),
    Defect(
        "submissions wait for ever",
        JOURNAL,
        "        return server.clock - entry.clock >= self._submit_limit and entry.handle in server.jobs",
        "        return False",
    ),
    Defect(
        "wall clock decides how long a submission waits",
        JOURNAL,
        "        return server.clock - entry.clock >= self._submit_limit",
        '        return server.now - getattr(entry, "at", 0.0) >= self._submit_limit',
    ),
    Defect(
        "unknown commit written again without a look",
        JOURNAL,
        "self._failed = Batch(entries, again=True,",
        "self._failed = Batch(entries, again=False,",
    ),
    Defect(
        "failed batch forgotten",
        JOURNAL,
        "        self._failed = Batch(entries, again=True,",
        "        entries = [entry for entry in entries if _is_submission(entry)]\n"
        "        self._failed = Batch(entries, again=True,",
    ),
    Defect(
        "neighbours of a bad row not told",
        JOURNAL,
        "server.committed(entry for index, entry in enumerate(batch.entries) if index not in refused)\n",
        "pass\n",
    ),
    Defect(
        "handed out though the lease may be lost",
        JOURNAL,
        "        self.renewed(batch.renewed)\n",
        "",
    ),
    Defect(
        "fencing left out",
        STORE,
        "            raise LeaseLost(self.name)\n",
        "            pass\n",
    ),
    Defect(
        "epoch not raised at a take-over",
        STORE,
        "            lease.epoch += 1\n            more",
        "            more",
    ),
    Defect(
        "jobs that ran at a dead server forgotten",
        STORE,
        "        some = [row for row in self._held(lease) if row.epoch",
        "        some = [row for row in self._held(lease) if not row.attempts and row.epoch",
    ),
    Defect(
        "row claimed by whoever comes",
        STORE,
        "            if row.server is None:\n                crowd = ",
        "            if row.server != self.lease_id:\n                crowd = ",
    ),
    Defect(
        "claim with unknown outcome not looked up",
        STORE,
        "                self._perhaps_taken = [*unsure, *rows]\n",
        "",
    ),
    Defect(
        "claimed again though it has ended",
        JOURNAL,
        "        if ended:\n            claimed = claimed._replace(",
        "        if False:\n            claimed = claimed._replace(",
    ),
    Defect(
        "later jobs overtake those at the door",
        WINDOW,
        "        if priority in function.left or priority in function.spilling or not self.door_seen:",
        "        if priority in function.spilling or not self.door_seen:",
    ),
    Defect(
        "first jobs after a start overtake those at the door",
        WINDOW,
        " or priority in function.spilling or not self.door_seen:",
        " or priority in function.spilling:",
    ),
    Defect(
        "job taken back from the door not taken up",
        CORE,
        "                self._take_back(held, stored)\n",
        "",
    ),
    Defect(
        "less urgent jobs do not wait for those at the door",
        WINDOW,
        "        return self._server.clock - self.claimed_at < STORE_AWAY",
        "        return False",
    ),
    Defect(
        "counts forget what lies at the door",
        WINDOW,
        "                function.later += waiting.later\n",
        "",
    ),
    Defect(
        "abandoned foreground job stays",
        CORE,
        " if listener is not peer] or None\n            self.drop_if_abandoned(job)\n",
        " if listener is not peer] or None\n",
    ),
    Defect(
        "job that was put back loses an attempt",
        CORE,
        "        if not counts:\n            job.attempts -= 1\n",
        "",
    ),
    Defect(
        "worker comes back to a job that was handed out since",
        CREWS,
        " and int(number[:6]) - job.attempts in (0, 1)",
        "",
    ),
    Defect(
        "jobs that have ended fill the window",
        JOBS,
        "            if counts[priority] + self.arriving >= window:",
        "            if len(self.levels.get(priority, ())) + self.arriving >= window:",
    ),
    Defect(
        "job that was asked for is lost with the reply",
        STORE,
        "            self._perhaps_taken += taken\n",
        "",
    ),
    Defect(
        "an older entry's commit acknowledges",
        CORE,
        "                if job is None or job.awaited is not entry:",
        "                if job is None or job.answers is None:",
    ),
    Defect(
        "permits of other servers not counted",
        PERMITS,
        "limit.concurrency - taken - request.held",
        "limit.concurrency - request.held",
    ),
    Defect(
        "starts that were not told of not counted",
        PERMITS,
        "limit.rate - begun - unused - request.unused",
        "limit.rate - begun",
    ),
    Defect(
        "permits of a server that died stay in use",
        PERMITS,
        "[name for name in self.holders if not is_alive(name)]",
        "()",
    ),
    Defect(
        "permit not given back at the end of an attempt",
        CORE,
        "            if job.gate is not None:\n                self.limits.give_back(job)\n\n    def fail",
        "            job.gate = None\n\n    def fail",
    ),
    Defect(
        "refused permits not asked for again",
        LIMITS,
        "                self._look_again(gate, gate.not_before)\n",
        "                pass\n",
    ),
    Defect(
        "unused permits kept",
        LIMITS,
        "if at <= last]",
        "if False]",
    ),
    Defect(
        "unused permits kept while workers are busy",
        LIMITS,
        "last = clock - (UNUSED_BY_BUSY if is_busy else UNUSED)",
        "last = clock - (math.inf if is_busy else UNUSED)",
    ),
    Defect(
        "limited foreground jobs handed out without the store",
        CORE,
        "for each in abilities.values() if each.limiter is None)",
        "for each in abilities.values())",
    ),
]

QUICK: Final = (
    "acknowledged before the commit",
    "fencing left out",
    "epoch not raised at a take-over",
    "late refusal not undone",
    "later jobs overtake those at the door",
    "claim with unknown outcome not looked up",
)
"""Those that every run looks for."""


def edited(defect: Defect) -> str:
    """The source of the defect's module with the defect in it."""
    with open(_origin(defect), encoding="utf-8") as file:
        source = file.read()
    if source.count(defect.old) != 1:
        raise CannotApply(f"{defect.name!r}: its text is {source.count(defect.old)} times in {defect.module}")
    return source.replace(defect.old, defect.new)


def apply(name: str) -> None:
    """Break the code of this process. Call it before anything of the server is imported."""
    defect = next((defect for defect in DEFECTS if defect.name == name), None)
    if defect is None:
        raise CannotApply(f"There is no defect {name!r}")
    assert defect.module not in sys.modules, "the code was imported already"
    source = edited(defect)
    spec = importlib.util.find_spec(defect.module)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[defect.module] = module
    exec(compile(source, _origin(defect), "exec"), module.__dict__)
    parent, _, child = defect.module.rpartition(".")
    setattr(sys.modules[parent], child, module)


def _origin(defect: Defect) -> str:
    spec = importlib.util.find_spec(defect.module)
    assert spec is not None
    assert spec.origin is not None
    return spec.origin
