"""Views that call jobs in every way."""

from __future__ import annotations

import os

from django.db import transaction
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.views.decorators.http import require_safe

from django_gearman.exceptions import GearmanError
from tests.app.jobs import add, shout


@require_safe
def enqueue(request: HttpRequest) -> JsonResponse:
    left = int(request.GET["left"])
    result = add.enqueue(left, right=1)
    return JsonResponse({"left": left, "id": result.id, "pid": os.getpid()})


@require_safe
def enqueue_and_raise(request: HttpRequest) -> HttpResponse:
    with transaction.atomic():
        add.enqueue(1)
        raise RuntimeError("the view changed its mind")


@require_safe
def insist(request: HttpRequest) -> JsonResponse:
    """Run a job that may run twice, for as long as a user would wait."""
    text = request.GET["text"].encode()
    try:
        answer = shout.using(run_timeout=60.0, resubmit=True).run(text)
    except GearmanError as error:
        return JsonResponse({"error": f"{type(error).__name__}: {error}"}, status=503)
    return JsonResponse({"answer": answer.decode(), "pid": os.getpid()})


@require_safe
def run(request: HttpRequest) -> JsonResponse:
    answer = shout.run(request.GET["text"].encode())
    return JsonResponse({"answer": answer.decode(), "pid": os.getpid()})
