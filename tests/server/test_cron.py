"""The fields of SUBMIT_JOB_SCHED, and what the core makes of them. PROTOCOL section 2, type 35."""

from __future__ import annotations

from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest

from django_gearman.protocol.packets import PacketType as P
from django_gearman.server.cron import next_match
from django_gearman.server.entries import JobQueued

from .harness import Wire, handle

PARIS = ZoneInfo("Europe/Paris")


def after(moment: str, fields: str, zone: ZoneInfo | None = None) -> str:
    """The next moment as the zone's clock shows it; fields as in a crontab, ``_`` for an empty one."""
    clock = zone or UTC
    start = datetime.fromisoformat(moment)
    start = start.replace(tzinfo=clock) if start.tzinfo is None else start
    parts = [b"" if part == "_" else part.encode() for part in fields.split()]
    found = next_match(parts, start.timestamp(), clock)
    assert found > start.timestamp()
    return datetime.fromtimestamp(found, clock).isoformat(timespec="minutes")[:22]


class TestNextMatch:
    @pytest.mark.parametrize(
        ("fields", "moment"),
        [
            ("* * * * *", "2026-11-21T14:21"),
            ("_ _ _ _ _", "2026-11-21T14:21"),
            ("30 * * * *", "2026-11-21T14:30"),
            ("10 * * * *", "2026-11-21T15:10"),
            ("20 14 * * *", "2026-11-22T14:20"),  # that minute has begun
            ("0 6 * * *", "2026-11-22T06:00"),
            ("*/15 * * * *", "2026-11-21T14:30"),
            ("5/20 * * * *", "2026-11-21T14:25"),
            ("0 8-18/5 * * *", "2026-11-21T18:00"),
            ("0,40,50 14 * * *", "2026-11-21T14:40"),
            ("0 0 1 * *", "2026-12-01T00:00"),
            ("0 0 * 2 *", "2027-02-01T00:00"),
            ("0 0 31 * *", "2026-12-31T00:00"),
            ("0 0 31 4,5 *", "2027-05-31T00:00"),
            ("0 0 29 2 *", "2028-02-29T00:00"),
            ("0 0 29 2 6", "2032-02-29T00:00"),  # a Sunday
            ("0 12 * * 0", "2026-11-23T12:00"),  # Monday is 0
            ("0 12 * * 5", "2026-11-28T12:00"),  # a Saturday, and today's noon is past
            ("0 15 * * 5", "2026-11-21T15:00"),
            ("0 0 13 * 4", "2027-08-13T00:00"),  # both: Friday the thirteenth
        ],
    )
    def test_after_a_saturday_afternoon(self, fields, moment):
        assert after("2026-11-21T14:20:30", fields) == moment + "+00:00"

    def test_moment_itself_is_past(self):
        assert after("2026-11-21T14:20:00", "20 14 * * *") == "2026-11-22T14:20+00:00"

    def test_last_minute_of_a_year(self):
        assert after("2026-12-31T23:59:59", "* * * * *") == "2027-01-01T00:00+00:00"

    def test_fields_are_of_the_zone(self):
        assert after("2026-07-01T00:00", "0 9 * * *", PARIS) == "2026-07-01T09:00+02:00"

    def test_time_that_is_left_out_in_spring_is_the_one_shown_then(self):
        assert after("2026-03-29T01:00", "30 2 * * *", PARIS) == "2026-03-29T03:30+02:00"

    def test_time_that_comes_twice_in_autumn(self):
        assert after("2026-10-25T01:00", "30 2 * * *", PARIS) == "2026-10-25T02:30+02:00"
        assert after("2026-10-25T02:45+02:00", "50 2 * * *", PARIS) == "2026-10-25T02:50+02:00"
        assert after("2026-10-25T02:45+01:00", "50 2 * * *", PARIS) == "2026-10-25T02:50+01:00"
        assert after("2026-10-25T02:55+02:00", "* * * * *", PARIS) == "2026-10-25T02:56+02:00"
        assert after("2026-10-25T02:59+02:00", "* * * * *", PARIS) == "2026-10-25T02:00+01:00"

    @pytest.mark.parametrize(
        ("fields", "name"),
        [
            ("60 * * * *", "Minute is .* 0 to 59"),
            ("* 24 * * *", "Hour is .* 0 to 23"),
            ("* * 0 * *", "Day of month is .* 1 to 31"),
            ("* * * 13 *", "Month is .* 1 to 12"),
            ("* * * * 7", "Day of week is .* 0 to 6"),
            ("-1 * * * *", "Minute"),
            ("5-1 * * * *", "Minute"),
            ("*/0 * * * *", "Minute"),
            ("1, * * * *", "Minute"),
            ("**/2 * * * *", "Minute"),
            ("1-2-3 * * * *", "Minute"),
            ("mon * * * *", "Minute"),
            ("²/2 * * * *", "Minute"),
            ("9" * 100 + " * * * *", "Minute"),
            ("1," * 100 + "1 * * * *", "Minute"),
            ("* * 30 2 *", "No day has that"),
            ("* * 31 4,6 *", "No day has that"),
        ],
    )
    def test_what_names_no_moment(self, fields, name):
        with pytest.raises(ValueError, match=name):
            after("2026-11-21T14:20:30", fields)

    def test_every_minute_of_four_years_agrees_with_a_plain_search(self):
        """A search minute by minute finds what the jumps find."""
        fields = [b"7", b"*/11", b"28-31", b"2,3", b"0,3,6"]
        moment = datetime(2026, 1, 1, tzinfo=UTC).timestamp()
        found = []
        for _ in range(40):
            moment = next_match(fields, moment, UTC)
            found.append(moment)
        plain = []
        minute = datetime(2026, 1, 1, tzinfo=UTC).timestamp()
        while len(plain) < 40:
            minute += 60
            clock = datetime.fromtimestamp(minute, UTC)
            if (
                clock.minute == 7
                and clock.hour in (0, 11, 22)
                and clock.day >= 28
                and clock.month in (2, 3)
                and clock.weekday() in (0, 3, 6)
            ):
                plain.append(minute)
            elif clock.month not in (2, 3) or clock.day < 28:
                minute += 86400 - 60 - (clock.hour * 60 + clock.minute) * 60
        assert found == plain


class TestSubmission:
    """Type 35: once, in the background, at the moment named. No C server has it."""

    FIELDS = (b"30", b"0", b"", b"*", b"")

    def test_job_runs_once_at_that_moment(self):
        wire = Wire(zone=UTC)
        client, worker = wire.connect(), wire.worker(b"f")
        assert client(P.SUBMIT_JOB_SCHED, b"f", b"u", *self.FIELDS, b"w\0w") == [(P.JOB_CREATED, handle(1))]
        assert wire.core.next_due() == 1800
        assert worker.grabs() is None
        assert worker(P.PRE_SLEEP) == []
        wire.core.now = 1800
        wire.core.tick()
        assert worker.hears() == [(P.NOOP,)]
        assert worker(P.GRAB_JOB_UNIQ) == [(P.JOB_ASSIGN_UNIQ, handle(1), b"f", b"u", b"w\0w")]
        assert worker(P.WORK_COMPLETE, handle(1), b"") == []
        assert wire.core.jobs == {}

    def test_it_is_kept_with_its_time(self):
        wire = Wire(durable=True, zone=UTC)
        client = wire.connect()
        assert client(P.SUBMIT_JOB_SCHED, b"f", b"u", *self.FIELDS, b"w") == []
        (entry,) = wire.commit()
        assert isinstance(entry, JobQueued)
        assert (entry.run_after, entry.background) == (1800, True)
        assert client.hears() == [(P.JOB_CREATED, handle(1))]

    def test_fields_that_name_no_moment_are_refused(self):
        wire = Wire()
        client = wire.connect()
        ((kind, code, text),) = client(P.SUBMIT_JOB_SCHED, b"f", b"", b"61", b"", b"", b"", b"", b"w")
        assert (kind, code) == (P.ERROR, b"INVALID_ARGUMENT")
        assert text == b"Minute is *, numbers from 0 to 59, ranges and steps of these"
        assert client(P.ECHO_REQ, b"still here") == [(P.ECHO_RES, b"still here")]
        assert wire.core.functions == {}
