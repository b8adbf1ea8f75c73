"""When schedules are due: no rows and no clock; moments are written as the clocks of a place show them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import pairwise, takewhile
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from django_gearman import cron, every, schedules
from django_gearman.exceptions import InvalidSchedule, MissingCronsim
from django_gearman.schedules import CronTiming, IntervalTiming, due_times, next_times, timing


def at(text: str) -> int:
    """Seconds since 1970 of a moment such as "2026-03-29 01:30:00 +01:00"."""
    return int(datetime.fromisoformat(text.replace(" +", "+").replace(" -0", "-0")).timestamp())


def shown(moments: list[int], zone: str) -> list[str]:
    return [datetime.fromtimestamp(each, ZoneInfo(zone)).strftime("%d %H:%M %z") for each in moments]


def following(expression: str, zone: str, after: str, count: int = 4) -> list[str]:
    times = timing(expression, None, zone)
    return shown(next_times(times, times.next_after(at(after), None), count), zone)


PARIS, NEW_YORK, LORD_HOWE = "Europe/Paris", "America/New_York", "Australia/Lord_Howe"


class TestCron:
    @pytest.mark.parametrize(
        ("expression", "zone", "after", "expected"),
        [
            pytest.param(
                "*/5 * * * *",
                "UTC",
                "2026-01-01 00:01:00 +00:00",
                ["01 00:05 +0000", "01 00:10 +0000", "01 00:15 +0000", "01 00:20 +0000"],
                id="plain",
            ),
            pytest.param(
                "0 9 * * MON-FRI",
                PARIS,
                "2026-01-02 09:00:00 +01:00",
                ["05 09:00 +0100", "06 09:00 +0100", "07 09:00 +0100", "08 09:00 +0100"],
                id="a time is not its own next",
            ),
            # Clocks put forward: 29 March 2026, 02:00 +0100 is 03:00 +0200.
            pytest.param(
                "30 2 * * *",
                PARIS,
                "2026-03-28 00:00:00 +01:00",
                ["28 02:30 +0100", "29 03:00 +0200", "30 02:30 +0200", "31 02:30 +0200"],
                id="forward: a time left out is the moment of the change",
            ),
            pytest.param(
                "0,30 2,3 * * *",
                PARIS,
                "2026-03-29 00:00:00 +01:00",
                ["29 03:00 +0200", "29 03:30 +0200", "30 02:00 +0200", "30 02:30 +0200"],
                id="forward: several left out are one",
            ),
            pytest.param(
                "*/30 * * * *",
                PARIS,
                "2026-03-29 01:00:00 +01:00",
                ["29 01:30 +0100", "29 03:00 +0200", "29 03:30 +0200", "29 04:00 +0200"],
                id="forward: every half hour stays that",
            ),
            pytest.param(
                "15 3 * * *",
                PARIS,
                "2026-03-28 12:00:00 +01:00",
                ["29 03:15 +0200", "30 03:15 +0200", "31 03:15 +0200", "01 03:15 +0200"],
                id="forward: a time after the change is itself",
            ),
            pytest.param(
                "30 2 * * *",
                NEW_YORK,
                "2026-03-07 12:00:00 -05:00",
                ["08 03:00 -0400", "09 02:30 -0400", "10 02:30 -0400", "11 02:30 -0400"],
                id="forward in New York",
            ),
            # Clocks put back: 25 October 2026, 03:00 +0200 is 02:00 +0100.
            pytest.param(
                "30 2 * * *",
                PARIS,
                "2026-10-24 12:00:00 +02:00",
                ["25 02:30 +0200", "26 02:30 +0100", "27 02:30 +0100", "28 02:30 +0100"],
                id="back: the first of two",
            ),
            pytest.param(
                "30 2 * * *",
                PARIS,
                "2026-10-25 02:30:00 +02:00",
                ["26 02:30 +0100", "27 02:30 +0100", "28 02:30 +0100", "29 02:30 +0100"],
                id="back: not the second",
            ),
            pytest.param(
                "30 2 * * *",
                PARIS,
                "2026-10-25 02:10:00 +01:00",
                ["26 02:30 +0100", "27 02:30 +0100", "28 02:30 +0100", "29 02:30 +0100"],
                id="back: asked in the second hour, never a time that has passed",
            ),
            pytest.param(
                "*/30 * * * *",
                PARIS,
                "2026-10-25 02:00:00 +02:00",
                ["25 02:30 +0200", "25 02:00 +0100", "25 02:30 +0100", "25 03:00 +0100"],
                id="back: every half hour stays that",
            ),
            pytest.param(
                "0 * * * *",
                PARIS,
                "2026-10-25 01:30:00 +02:00",
                ["25 02:00 +0200", "25 02:00 +0100", "25 03:00 +0100", "25 04:00 +0100"],
                id="back: each hour that passes",
            ),
            pytest.param(
                "30 1 * * *",
                NEW_YORK,
                "2026-10-31 12:00:00 -04:00",
                ["01 01:30 -0400", "02 01:30 -0500", "03 01:30 -0500", "04 01:30 -0500"],
                id="back in New York",
            ),
            # Lord Howe changes by half an hour: 4 October 2026, 02:00 +1030 is 02:30 +1100.
            pytest.param(
                "15 2 * * *",
                LORD_HOWE,
                "2026-10-03 12:00:00 +10:30",
                ["04 02:30 +1100", "05 02:15 +1100", "06 02:15 +1100", "07 02:15 +1100"],
                id="forward by half an hour",
            ),
            pytest.param(
                "45 1 * * *",
                LORD_HOWE,
                "2026-04-04 12:00:00 +11:00",
                ["05 01:45 +1100", "06 01:45 +1030", "07 01:45 +1030", "08 01:45 +1030"],
                id="back by half an hour",
            ),
            pytest.param(
                "*/30 * * * *",
                LORD_HOWE,
                "2026-04-05 01:00:00 +11:00",
                ["05 01:30 +1100", "05 01:30 +1030", "05 02:00 +1030", "05 02:30 +1030"],
                id="back by half an hour: every half hour stays that",
            ),
            # Cairo's days of the change begin at 01:00: 24 April 2026.
            pytest.param(
                "0 0 * * *",
                "Africa/Cairo",
                "2026-04-23 12:00:00 +02:00",
                ["24 01:00 +0300", "25 00:00 +0300", "26 00:00 +0300", "27 00:00 +0300"],
                id="a midnight left out",
            ),
        ],
    )
    def test_next(self, expression: str, zone: str, after: str, expected: list[str]):
        assert following(expression, zone, after) == expected

    @pytest.mark.parametrize(
        ("zone", "day"),
        [
            # Their midnights are left out.
            ("Africa/Cairo", "2026-04-24"),
            ("America/Santiago", "2026-09-06"),
            ("America/Havana", "2026-03-08"),
            # Here an hour around midnight, or half of one, comes twice.
            ("America/Santiago", "2026-04-05"),
            (LORD_HOWE, "2026-04-05"),
            (PARIS, "2026-10-25"),
        ],
    )
    @pytest.mark.parametrize("time", ["*/30 1", "*/20 0-2", "0 */2", "*/7 *"])
    def test_time_that_passes_agrees_with_a_plain_search(self, zone: str, day: str, time: str):
        date = datetime.fromisoformat(f"{day} 00:00:00+00:00")
        expression = f"{time} {date.day} {date.month} *"
        start = int(date.timestamp()) - 86_400
        everything = CronTiming(expression, UTC)
        # What UTC's clock shows at those times.
        shown = set(takewhile(lambda each: each < start + 3 * 86_400, everything._after(start)))
        expected = []
        for moment in range(start + 60, start + 3 * 86_400, 60):
            offset = datetime.fromtimestamp(moment, ZoneInfo(zone)).utcoffset()
            assert offset is not None
            if moment + int(offset.total_seconds()) in shown:
                expected.append(moment)
        times = CronTiming(expression, ZoneInfo(zone))
        assert list(takewhile(lambda each: each < start + 3 * 86_400, times._after(start))) == expected

    def test_leap_days(self):
        times = timing("0 0 29 2 *", None, "UTC")
        found = next_times(times, times.next_after(at("2026-01-01 00:00:00 +00:00"), None), 2)
        assert [datetime.fromtimestamp(each, UTC).year for each in found] == [2028, 2032]

    @pytest.mark.parametrize(
        ("zone", "day"),
        [
            (PARIS, "2026-03-28"),
            (PARIS, "2026-10-24"),
            (LORD_HOWE, "2026-10-03"),
            ("Africa/Cairo", "2026-04-23"),
            ("Africa/Cairo", "2026-10-29"),
            ("America/St_Johns", "2026-10-31"),
        ],
    )
    @pytest.mark.parametrize(
        "expression",
        ["*/7 * * * *", "30 2 * * *", "0 */3 * * *", "15,45 1-3 * * *", "* 2 * * *", "0 0 * * *"],
    )
    def test_whenever_one_asks_the_next_is_the_same(self, expression: str, zone: str, day: str):
        """What is next must not depend on when it was asked for: servers ask at different moments."""
        times = timing(expression, None, zone)
        start = at(f"{day} 06:00:00 +00:00")
        end = start + 3 * 86_400
        expected = list(
            takewhile(lambda each: each < end, next_times(times, times.next_after(start, None), 700))
        )
        assert len(expected) < 700
        for moment in range(start, start + 2 * 86_400, 420):
            assert times.next_after(moment, None) == next(each for each in expected if each > moment)
            last = [each for each in expected if each <= moment]
            if last:
                assert times.last_until(moment, expected[0]) == last[-1]

    @pytest.mark.parametrize(
        "window", [timedelta(minutes=3), timedelta(hours=9), timedelta(days=40), timedelta(days=2000)]
    )
    def test_the_last_time_however_long_ago(self, window: timedelta):
        times = timing("17 4 1 1 *", None, "UTC")
        planned = at("2020-01-01 04:17:00 +00:00")
        now = planned + int(window.total_seconds())
        last = datetime.fromtimestamp(times.last_until(now, planned), UTC)
        year = datetime.fromtimestamp(now, UTC).year
        assert last == datetime(year, 1, 1, 4, 17, tzinfo=UTC)


class TestInterval:
    def test_first_is_one_interval_away(self):
        assert IntervalTiming(60).next_after(1000, None) == 1060

    @pytest.mark.parametrize(
        ("moment", "expected"),
        [(1000, 1060), (1059, 1060), (1060, 1120), (1185, 1240), (900, 940), (940, 1000)],
    )
    def test_it_keeps_its_step(self, moment: int, expected: int):
        assert IntervalTiming(60).next_after(moment, 1000) == expected

    def test_clocks_on_walls_make_no_difference(self):
        times = timing("", timedelta(hours=24), PARIS)
        first = at("2026-03-28 12:00:00 +01:00")
        assert shown(next_times(times, first, 2), PARIS) == ["28 12:00 +0100", "29 13:00 +0200"]


MINUTES = CronTiming("* * * * *", ZoneInfo("UTC"))
NOON = at("2026-01-01 12:00:00 +00:00")


class TestMissedTimes:
    """``due_times``: (seconds from NOON to now, catch-up, seconds from NOON of the jobs, and of the next)."""

    @pytest.mark.parametrize("times", [MINUTES, IntervalTiming(60)], ids=["cron", "interval"])
    @pytest.mark.parametrize(
        ("now", "catch_up", "fired", "following"),
        [
            (0, "none", [0], 60),
            (59, "none", [0], 60),
            (60, "none", [60], 120),
            (3605, "none", [3600], 3660),
            (0, "one", [0], 60),
            (60, "one", [60], 120),
            (3605, "one", [3600], 3660),
            (0, "all", [0], 60),
            (60, "all", [0, 60], 120),
            (250, "all", [0, 60, 120, 180, 240], 300),
            (6000, "all", list(range(0, 6000, 60)), 6000),
        ],
    )
    def test_every_minute(self, times: Any, now: int, catch_up: str, fired: list[int], following: int):
        due = due_times(times, NOON, NOON + now, catch_up)
        assert ([each - NOON for each in due.times], due.next_at - NOON) == (fired, following)

    @pytest.mark.parametrize(
        ("late", "fires"), [(0, True), (schedules.LATE, True), (schedules.LATE + 1, False), (40_000, False)]
    )
    def test_none_leaves_what_nobody_saw_in_time(self, late: int, fires: bool):
        due = due_times(timing("0 12 * * *", None, "UTC"), NOON, NOON + late, "none")
        assert due == ([NOON] if fires else [], NOON + 86_400)

    @pytest.mark.parametrize("catch_up", ["one", "all"])
    def test_a_night_missed_is_made_up_for(self, catch_up: str):
        due = due_times(timing("0 12 * * *", None, "UTC"), NOON, NOON + 40_000, catch_up)
        assert due == ([NOON], NOON + 86_400)

    def test_all_goes_on_where_it_stopped(self):
        fired: list[int] = []
        next_at, now = NOON, NOON + 15_000
        for _ in range(4):
            due = due_times(MINUTES, next_at, now, "all")
            assert len(due.times) <= schedules.MAX_AT_ONCE
            fired += due.times
            next_at = due.next_at
            if next_at > now:
                break
        assert fired == list(range(NOON, now + 1, 60))

    @pytest.mark.parametrize("catch_up", ["one", "all"])
    def test_once_each_over_both_changes(self, catch_up: str):
        """A server that looks once a minute for a day: no time is lost, none comes twice."""
        for day in ("2026-03-28", "2026-10-24"):
            start = at(f"{day} 12:00:00 +00:00")
            for expression in ("30 2 * * *", "*/10 * * * *", "0,20,40 1-4 * * *"):
                times = timing(expression, None, PARIS)
                next_at = first = times.next_after(start, None)
                fired: list[int] = []
                for now in range(start, start + 86_400, 60):
                    if next_at <= now:
                        due = due_times(times, next_at, now, catch_up)
                        fired += due.times
                        next_at = due.next_at
                assert fired == [each for each in next_times(times, first, 200) if each < start + 86_400]
                assert all(earlier < later for earlier, later in pairwise(fired))


class TestClocks:
    """What becomes of schedules when the clock of the machine jumps."""

    def test_put_back_nothing_comes_twice(self):
        fired: list[int] = []
        next_at = NOON
        for now in [*range(NOON, NOON + 600, 10), *range(NOON + 300, NOON + 1200, 10)]:
            if next_at <= now:
                due = due_times(MINUTES, next_at, now, "all")
                fired += due.times
                next_at = due.next_at
        assert fired == list(range(NOON, NOON + 1200, 60))

    def test_put_forward_is_as_if_no_server_had_been_up(self):
        assert due_times(MINUTES, NOON, NOON + 3600, "one").times == [NOON + 3600]
        assert len(due_times(MINUTES, NOON, NOON + 3600, "all").times) == 61


class TestWrongOnes:
    @pytest.mark.parametrize(
        ("expression", "said"),
        [
            ("", "either a cron or an interval"),
            ("* * * *", "five fields"),
            ("* * * * * *", "five fields"),
            ("@daily", "five fields"),
            ("60 * * * *", "Bad minute"),
            ("* 24 * * *", "Bad hour"),
            ("0 0 30 2 *", "Bad day-of-month"),
            ("*/0 * * * *", "Bad minute"),
            ("1 * * * x", "Bad day-of-week"),
            ("9" * 5000 + " * * * *", "cannot be read"),
        ],
    )
    def test_crons(self, expression: str, said: str):
        with pytest.raises(InvalidSchedule, match=said):
            timing(expression, None, "UTC")

    @given(st.lists(st.text("0123456789*/,-#LWMON?é²", max_size=8), min_size=5, max_size=5).map(" ".join))
    def test_whatever_is_written_there_is_one_error(self, expression: str):
        try:
            times = timing(expression, None, PARIS)
        except InvalidSchedule:
            return
        assert times.next_after(NOON, None) > NOON

    @pytest.mark.parametrize(
        "zone", ["Europe/Pariss", "", "/etc/passwd", "../UTC", "Europe", "a\0b", None, 7]
    )
    def test_zones(self, zone: Any):
        with pytest.raises(InvalidSchedule, match="is no time zone"):
            timing("* * * * *", None, zone)

    @pytest.mark.parametrize(
        "interval", [timedelta(0), timedelta(milliseconds=1500), timedelta(seconds=-5), 60, "60"]
    )
    def test_intervals(self, interval: Any):
        with pytest.raises(InvalidSchedule, match="interval is"):
            timing("", interval, "UTC")

    def test_both(self):
        with pytest.raises(InvalidSchedule, match="either"):
            timing("* * * * *", timedelta(1), "UTC")

    def test_without_the_library_the_sentence_names_the_extra(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(schedules, "has_cronsim", lambda: False)
        with pytest.raises(MissingCronsim, match=r"pip install cronsim \(our extra \[schedules\]"):
            timing("* * * * *", None, "UTC")
        assert timing("", timedelta(minutes=1), "UTC").next_after(0, None) == 60


class TestDeclarations:
    def test_one_or_several(self):
        one, other = cron("* * * * *"), every(timedelta(1), name="daily")
        assert schedules.declarations(None) == ()
        assert schedules.declarations(one) == (one,)
        assert schedules.declarations([one, other]) == (one, other)
        assert (one.row_name("a.b"), other.row_name("a.b")) == ("a.b", "a.b:daily")

    def test_nothing_is_read_when_it_is_declared(self):
        assert cron("nonsense", tz="Nowhere").cron == "nonsense"

    @pytest.mark.parametrize(
        "declared",
        [
            "* * * * *",
            timedelta(hours=1),
            [cron("* * * * *"), cron("* * * * *")],
            cron("* * * * *", catch_up="some"),
            cron("* * * * *", name="x" * 61),
            cron("* * * * *", name="a\nb"),
        ],
    )
    def test_what_is_none(self, declared: object):
        with pytest.raises(InvalidSchedule):
            schedules.declarations(declared)
