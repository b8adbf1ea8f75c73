"""Who may have how many permits: the arithmetic, without rows and clocks."""

from __future__ import annotations

import random

import pytest

from django_gearman import permits
from django_gearman.permits import Limit, Request, Use, parse_rate


class Server:
    """One that tells the truth, in a world whose clock is an argument."""

    def __init__(self, use: Use, name: str, limit: Limit) -> None:
        self.use = use
        self.name = name
        self.limit = limit
        self.held = 0
        self.unused = 0
        self.untold: list[tuple[int, float]] = []
        self.begun: list[float] = []

    def ask(self, wanted: int, now: float, *, dead: tuple[str, ...] = ()) -> int:
        request = Request(b"", self.held, self.unused, wanted, tuple(self.untold))
        granted = self.use.decide(self.limit, self.name, request, now, now, lambda name: name not in dead)
        self.untold = []
        self.held += granted.permits
        self.unused += granted.permits
        return granted.permits

    def begin(self, now: float) -> None:
        self.unused -= 1
        self.begun.append(now)
        self.untold.append((len(self.begun), now))

    def end(self) -> None:
        self.held -= 1


class TestRates:
    @pytest.mark.parametrize(
        ("text", "rate"),
        [("10/m", (10, 60)), ("5/30s", (5, 30)), (" 1/h ", (1, 3600)), ("7/2d", (7, 172_800))],
    )
    def test_are_read(self, text, rate):
        assert parse_rate(text) == rate

    @pytest.mark.parametrize(
        "text",
        ["", "10", "10/", "/m", "0/m", "10/0s", "-1/m", "1.5/m", "10/w", "1000001/s", "1/367d"],
    )
    def test_what_is_none_is_refused(self, text):
        with pytest.raises(ValueError, match="is no rate"):
            parse_rate(text)


class TestPeriods:
    @pytest.mark.parametrize("seed", range(20))
    def test_none_has_more_however_late_permits_are_used(self, seed):
        dice = random.Random(seed)
        limit = Limit(dice.choice((1, 3, 10)), 5.0)
        use, now = Use(), 0.0
        servers = [Server(use, f"{n}.1", limit) for n in range(3)]
        for _ in range(3_000):
            now += dice.random() * 0.1
            server = dice.choice(servers)
            if dice.random() < 0.5:
                server.ask(dice.choice((0, 1, 5)), now)
            elif server.unused:
                server.begin(now)
                server.end()
        begun = sorted(at for server in servers for at in server.begun)
        assert len(begun) > limit.rate
        assert all(b - a >= 5.0 for a, b in zip(begun, begun[limit.rate :], strict=False))

    def test_many_starts_take_no_room(self, monkeypatch):
        monkeypatch.setattr(permits, "EXACT", 10)
        limit, use = Limit(100, 10.0), Use()
        server = Server(use, "1.1", limit)
        now = 0.0
        for _ in range(2_000):
            now += 0.05
            if server.ask(1, now):
                server.begin(now)
                server.end()
        assert len(use.starts) <= 12
        assert all(b - a >= 10.0 for a, b in zip(server.begun, server.begun[100:], strict=False))
        # In ten periods, of which the coarser counting took a tenth at the most.
        assert len(server.begun) >= 850

    def test_what_a_dead_server_may_have_used_counts(self):
        limit, use = Limit(3, 10.0), Use()
        first, second = Server(use, "1.1", limit), Server(use, "2.1", limit)
        assert first.ask(3, 0.0) == 3
        assert second.ask(3, 5.0, dead=("1.1",)) == 0
        assert second.ask(3, 14.9, dead=("1.1",)) == 0
        assert second.ask(3, 15.1, dead=("1.1",)) == 3

    def test_a_clock_that_was_set_back_does_not_stop_it(self):
        limit, use = Limit(1, 10.0), Use()
        server = Server(use, "1.1", limit)
        assert server.ask(1, 5_000.0) == 1
        server.begin(5_000.0)
        server.end()
        assert server.ask(1, 100.0) == 0
        assert server.ask(1, 111.0) == 1

    def test_starts_that_are_counted_together_count_from_the_last(self, monkeypatch):
        monkeypatch.setattr(permits, "EXACT", 10)
        server = Server(Use(), "1.1", Limit(100, 10.0))
        for step in range(1, 101):
            assert server.ask(1, step * 0.05)
            server.begin(step * 0.05)
            server.end()
        # A crowd comes when the first of them are a period ago.
        for step in range(1_000, 2_100):
            for _ in range(server.ask(100, step * 0.01)):
                server.begin(step * 0.01)
                server.end()
        assert len(server.begun) >= 200
        assert all(b - a >= 10.0 for a, b in zip(server.begun, server.begun[100:], strict=False))


class TestTurns:
    @pytest.mark.parametrize("step", [0.0, 3_600.0, -3_600.0])
    def test_a_server_that_has_nothing_comes_next(self, step: float):
        """However the clock is set meanwhile."""
        limit, use = Limit(None, 60.0, 1), Use()
        busy, other = Server(use, "1.1", limit), Server(use, "2.1", limit)
        now, got = 10_000.0, []
        assert busy.ask(1, now) == 1
        for turn in range(200):
            now += 0.05 if turn != 10 else step
            for server in (busy, other):
                if server.held:
                    # Its job is over, and the next one wanted at once.
                    server.held = server.unused = 0
                if server.ask(1, now):
                    got.append(server.name)
        assert got.count("1.1") > 60
        assert got.count("2.1") > 60

    def test_who_asks_no_more_is_not_waited_for(self):
        limit, use = Limit(None, 60.0, 1), Use()
        busy, other = Server(use, "1.1", limit), Server(use, "2.1", limit)
        busy.ask(1, 0.0)
        assert other.ask(1, 0.1) == 0
        busy.held = busy.unused = 0
        assert busy.ask(1, 10.0) == 1


class TestText:
    def test_comes_back(self):
        limit, use = Limit(5, 60.0, 2), Use()
        server = Server(use, "1.1", limit)
        server.ask(2, 10.0)
        server.begin(10.5)
        server.ask(1, 11.0)
        again = Use.load(use.dump())
        assert again.dump() == use.dump()
        assert again.count(limit, 11.0) == (2, 1)
