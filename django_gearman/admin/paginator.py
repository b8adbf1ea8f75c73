"""
Pages of a table that may have many millions of rows.

Counting and OFFSET both cost what they skip, so neither goes further than
``LIMIT``. Other rows are reached by search, by filters, or from the oldest on.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Final

from django.conf import settings
from django.core.paginator import Paginator
from django.db import connections
from django.db.models import QuerySet

from django_gearman.models import JobRecord

LIMIT: Final = 10_000
"""Rows to count, and rows that can be reached page by page."""

if TYPE_CHECKING:
    JobPaginatorBase = Paginator[JobRecord]
else:
    JobPaginatorBase = Paginator


class Roughly(int):
    """A number of rows that is at least, or about, this."""

    sign = "+"

    def __str__(self) -> str:
        digits = super().__repr__()
        # Django groups digits from the end without looking at them.
        return digits if settings.USE_THOUSAND_SEPARATOR else digits + self.sign


class JobPaginator(JobPaginatorBase):
    """
    Counts up to ``LIMIT`` rows; beyond that ``count`` is a ``Roughly``.

    Pages end with the row ``LIMIT``; a page that does not exist becomes the
    nearest that does, because lists shrink while one looks at them.
    """

    object_list: QuerySet[JobRecord]

    @cached_property
    def count(self) -> int:
        counted = self.object_list.values("pk")[: LIMIT + 1].count()
        if counted <= LIMIT:
            return counted
        if self.object_list.query.where:
            return Roughly(LIMIT)
        return max(Roughly(LIMIT), Roughly(estimate(self.object_list)))

    @cached_property
    def num_pages(self) -> int:
        reachable = min(int(self.count), LIMIT)
        return max(1, -(-reachable // self.per_page))

    def validate_number(self, number: int | float | str) -> int:
        return min(max(int(number), 1), self.num_pages)


def estimate(jobs: QuerySet[JobRecord]) -> int:
    """Return about how many rows the table has, at a cost that does not depend on it."""
    connection = connections[jobs.db]
    if connection.vendor == "postgresql":
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT reltuples FROM pg_class WHERE oid = to_regclass(%s)",
                [connection.ops.quote_name(JobRecord._meta.db_table)],
            )
            row = cursor.fetchone()
        # -1 until the first VACUUM or ANALYZE.
        if row is not None and row[0] > 0:
            return int(row[0])
    # Right as long as old rows are removed from the old end. One query for each
    # end: asked for both at once, SQLite reads a whole index.
    ids = jobs.order_by("pk").values_list("pk", flat=True)
    first, last = ids.first(), ids.last()
    return 0 if first is None or last is None else last - first + 1
