"""
What the code declares, as rows that operators change too.

A row remembers in ``declared`` what the code said when it was last looked at.
Where that has not changed, the row stays as it is. Where it has, the row
follows, unless somebody had edited those fields: then the edit stays, and the
log says so. Whether a row is enabled is never the code's to say. Rows that the
code declares no more rest, and keep what they had for its return.

Knows neither schedules nor limits: whoever has such rows says how they look.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, ClassVar, Generic, TypeVar

from django.db import transaction

from .models import FunctionLimit, Schedule

logger = logging.getLogger(__name__)

Row = TypeVar("Row", Schedule, FunctionLimit)


class DeclaredRows(Generic[Row]):
    """A table of such rows; a subclass says which."""

    model: type[Row]
    key: ClassVar[str]
    """The field by which the code names a row."""

    title: ClassVar[str]
    """What the log calls a row; its name stands in place of ``%s``."""

    merged: ClassVar[tuple[tuple[str, ...], ...]]
    """Fields that operators may edit; those of one group are the code's or the operator's together."""

    followed: ClassVar[tuple[str, ...]] = ()
    """Fields that are the code's alone."""

    def kept(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        """Columns as ``declared`` keeps them, in JSON."""
        return dict(columns)

    def columns(self, kept: Mapping[str, Any]) -> dict[str, Any]:
        """Columns from what ``declared`` keeps."""
        return dict(kept)

    def mend(self, row: Row) -> None:
        """A row that was merged may make no sense where its fields did."""

    def synchronise(
        self, using: str, declared: Mapping[str, Mapping[str, Any]], *, complete: bool = True
    ) -> None:
        """
        Bring what the code declares into the table, without undoing what operators did there.

        Args:
            declared: {name of a row: its columns}.
            complete: Whether all of the code was read, so that what is missing is gone.
        """
        rows = self.model._default_manager.using(using)
        for name, columns in sorted(declared.items()):
            with transaction.atomic(using=using):
                fresh = self.kept(columns)
                row, is_new = rows.select_for_update().get_or_create(
                    **{self.key: name}, defaults={**columns, "declared": fresh}
                )
                if is_new:
                    logger.info(f"{self.title} is new", name)
                    continue
                self._merge(row, name, fresh)
                row.save(using=using)
        if complete:
            gone = rows.filter(declared__isnull=False, withdrawn=False)
            for row in gone.exclude(**{f"{self.key}__in": declared}):
                logger.info(f"{self.title} rests: the code declares it no more", getattr(row, self.key))
                row.withdrawn = True
                row.save(using=using)

    def _merge(self, row: Row, name: str, fresh: dict[str, Any]) -> None:
        known: dict[str, Any] | None = row.declared
        for field in self.followed:
            setattr(row, field, fresh[field])
        row.withdrawn = False
        row.declared = fresh
        if known is None:
            logger.warning(
                f"{self.title} was made by hand before the code declared it; it stays as it is", name
            )
            return
        there = self._there(row)
        for group in self.merged:
            if all(fresh[field] == known.get(field) for field in group):
                continue
            if all(there[field] == known.get(field) for field in group):
                for field in group:
                    setattr(row, field, self.columns(fresh)[field])
            elif any(there[field] != fresh[field] for field in group):
                logger.warning(
                    f"{self.title} was edited: what the code says now of %s is not taken",
                    name,
                    ", ".join(group),
                )
        self.mend(row)

    def _there(self, row: Row) -> dict[str, Any]:
        """A row as ``declared`` keeps it."""
        return self.kept({field: getattr(row, field) for group in self.merged for field in group})

    def reset(self, row: Row) -> None:
        """Take from a declared row what operators did to it; save it then."""
        for field, value in self.columns(row.declared or {}).items():
            setattr(row, field, value)

    def is_edited(self, row: Row) -> bool:
        """Whether it says something else than the code."""
        declared = row.declared
        return declared is not None and any(
            value != declared.get(field) for field, value in self._there(row).items()
        )
