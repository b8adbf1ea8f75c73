"""
Signals for projects: what becomes of jobs, told in the process where it happens.

All are sent with ``send_robust``: a receiver that raises is logged by Django,
under ``django.dispatch``, and costs no job. ``sender`` is the ``Job``, so that
``@receiver(job_finished, sender=make_thumbnail)`` hears of one function.

Receivers of the last three run in the worker, between the job and its report
to the job server: what they log is the job's, and their time counts as its.
"""

from django.dispatch import Signal

job_enqueued = Signal()
"""
A job was made by ``enqueue``, or again by ``JobResult.retry`` or the admin. ``result``: its ``JobResult``.

In the caller's transaction, which may be rolled back yet. Not sent for a
submission that joined another job, nor by schedules and other programs; nor
where a job is enqueued again by a process that does not know its function.
"""

job_started = Signal()
"""An attempt begins. ``context``: its ``JobContext``, the same in all signals of the attempt."""

job_finished = Signal()
"""
The job has succeeded, or failed for good.

``context``; ``exception``: what the function raised, None when it succeeded;
``seconds``: how long the attempt took. Not sent when a worker is lost: the
record alone tells of that.
"""

job_retried = Signal()
"""
The function raised, and the worker asked for another attempt.

``context``, ``exception``, ``seconds``; ``pause``: seconds until the next attempt. A
client that waits for a foreground job gets the exception, and there is no other attempt.
"""
