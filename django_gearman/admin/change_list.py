"""The list of jobs: which columns it reads, how far it looks, in which order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from django.contrib.admin.views.main import ChangeList
from django.db.models import QuerySet
from django.http import HttpRequest

from .filters import RECENT, JobFilter, newest
from .paginator import LIMIT, Roughly
from .payload import COLUMNS


class JobChangeList(ChangeList):
    recent = RECENT
    limit = LIMIT

    recent_only = False
    """Whether a filter restricts the list to the newest ``RECENT`` jobs."""

    def get_queryset(
        self, request: HttpRequest, exclude_parameters: list[str | None] | None = None
    ) -> QuerySet[Any]:
        jobs = super().get_queryset(request, exclude_parameters)
        self.recent_only = any(
            isinstance(spec, JobFilter) and spec.active and not spec.indexed for spec in self.filter_specs
        )
        if self.recent_only:
            jobs = jobs.filter(pk__gt=newest(request, self.model_admin) - RECENT)
        return jobs.defer(*COLUMNS)

    def get_ordering_field(self, field_name: Callable[..., Any] | str) -> Any:
        # ?o= would sort by any column that is a field, whatever sortable_by says.
        if field_name not in (self.sortable_by or ()):
            return None
        return super().get_ordering_field(field_name)

    def get_results(self, request: HttpRequest) -> None:
        super().get_results(request)
        self.page_num = self.paginator.validate_number(self.page_num)

    @property
    def estimated(self) -> bool:
        return isinstance(self.result_count, Roughly)
