"""Views that call jobs in every way."""

from __future__ import annotations

import os

from django.db import transaction
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.views.decorators.http import require_safe

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
def run(request: HttpRequest) -> JsonResponse:
    answer = shout.run(request.GET["text"].encode())
    return JsonResponse({"answer": answer.decode(), "pid": os.getpid()})
