"""How a world that broke a promise is told of, and how many kept theirs."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from . import runner

Tell = Callable[[runner.Report], None]


@pytest.fixture
def tell(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Tell:
    """Fails with the trace of the world that failed; else the run's summary says how many there were."""

    def check(report: runner.Report) -> None:
        if report.failed is not None:
            pytest.fail(runner.tell(report), pytrace=False)
        assert report.runs > 10
        record_property("simulated", str(report))

    return check
