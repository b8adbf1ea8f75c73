"""The page of the videos: upload, what becomes of each while it lasts, cancel and try again."""

from __future__ import annotations

from typing import Any

from django.contrib import messages
from django.core.paginator import Paginator
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect, StreamingHttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.template.loader import render_to_string
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_http_methods, require_POST, require_safe

from django_gearman.exceptions import ResponseTimeout

from . import streams
from .cards import VideoCard, video_cards
from .forms import VideoForm
from .models import Video
from .uploads import add_videos, try_again
from .views import PAGE, numbers


@never_cache
@require_http_methods(["GET", "HEAD", "POST"])
def index(request: HttpRequest) -> HttpResponse:
    if request.method != "POST":
        return _page(request, VideoForm())
    form = VideoForm(request.POST, request.FILES)
    if not form.is_valid():
        return _page(request, form, status=422)
    add_videos([form.cleaned_data["video"]])
    return redirect("gallery:videos")


def _page(request: HttpRequest, form: VideoForm, status: int = 200) -> HttpResponse:
    page = Paginator(Video.objects.all(), PAGE).get_page(request.GET.get("page"))
    context = {"form": form, "page": page, "cards": video_cards(page.object_list), "section": "videos"}
    return render(request, "gallery/videos.html", context, status=status)


@never_cache
@require_safe
def card_list(request: HttpRequest) -> HttpResponse:
    """The cards of ``?video=1&video=2`` as they are now."""
    return HttpResponse("".join(_cards_by_id(numbers(request, "video"))[0].values()))


@require_safe
async def stream(request: HttpRequest) -> StreamingHttpResponse:
    """The same again and again, as they change, until all have ended."""
    pks = numbers(request, "video")
    return streams.stream(request, lambda: _cards_by_id(pks))


def _cards_by_id(pks: list[int]) -> tuple[dict[str, str], bool]:
    cards = video_cards(Video.objects.filter(pk__in=pks))
    # Without HTML for what is not there: who asks for it still shows it.
    html = {f"video-{pk}": "" for pk in pks} | {f"video-{card.upload.pk}": _html(card) for card in cards}
    return html, all(card.is_finished for card in cards)


def _html(card: VideoCard) -> str:
    context: dict[str, Any] = {"card": card, "video": card.upload}
    return render_to_string("gallery/video_card.html", context)


@require_POST
def cancel(request: HttpRequest, pk: int) -> HttpResponseRedirect:
    video = get_object_or_404(Video, pk=pk)
    job = video.job()
    try:
        if job is not None and job.cancel():
            messages.success(request, f"“{video}” is cancelled.")
        else:
            messages.info(request, f"“{video}” had ended already.")
    except ResponseTimeout:
        messages.warning(request, f"“{video}” will be cancelled once its job server is there again.")
    return redirect("gallery:videos")


@require_POST
def again(request: HttpRequest, pk: int) -> HttpResponseRedirect:
    video = get_object_or_404(Video, pk=pk)
    (card,) = video_cards([video])
    if card.may_try_again:
        try_again(video)
    return redirect("gallery:videos")
