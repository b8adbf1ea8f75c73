"""The pages of the gallery: the grid with its upload form, the cards that it asks for again, the pictures."""

from __future__ import annotations

from pathlib import Path

from django.conf import settings
from django.core.paginator import Paginator
from django.http import FileResponse, HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.cache import cache_control, never_cache
from django.views.decorators.http import require_http_methods, require_safe
from django.views.static import serve

from django_gearman.exceptions import GearmanError, JobFailed

from .cards import cards
from .forms import PreviewForm, RenderForm, UploadForm
from .jobs import make_preview
from .models import Photo
from .uploads import add_photos

PAGE = 50
"""Photos on one page."""

PREVIEW_TIMEOUT = 3.0
"""Seconds that a visitor waits for a preview, before the photo is shown as it is."""


@never_cache
@require_http_methods(["GET", "HEAD", "POST"])
def index(request: HttpRequest) -> HttpResponse:
    if request.method != "POST":
        return _page(request, UploadForm())
    form = UploadForm(request.POST, request.FILES)
    if not form.is_valid():
        return _page(request, form, status=422)
    add_photos(form.cleaned_data["photos"])
    # Reloading the page must not upload again.
    return redirect("gallery:index")


def _page(request: HttpRequest, form: UploadForm, status: int = 200) -> HttpResponse:
    page = Paginator(Photo.objects.all(), PAGE).get_page(request.GET.get("page"))
    context = {
        "form": form,
        "render_form": RenderForm(label_suffix=""),
        "page": page,
        "cards": cards(page.object_list),
        "section": "photos",
    }
    return render(request, "gallery/index.html", context, status=status)


@never_cache
@require_safe
def card_list(request: HttpRequest) -> HttpResponse:
    """The cards of ``?photo=1&photo=2`` as they are now, for the page to put in place of its own."""
    photos = Photo.objects.filter(pk__in=numbers(request, "photo"))
    return render(request, "gallery/card_list.html", {"cards": cards(photos)})


def numbers(request: HttpRequest, name: str) -> list[int]:
    """What the query names, as many as a page shows."""
    return [int(pk) for pk in request.GET.getlist(name)[:PAGE] if pk.isdecimal() and len(pk) < 19]


@never_cache
@require_safe
def photo(request: HttpRequest, pk: int) -> HttpResponse:
    """A photo, and how it would look: a worker is asked while the visitor waits, but not for long."""
    photo = get_object_or_404(Photo, pk=pk, width__isnull=False)
    form = PreviewForm(request.GET or None, label_suffix="")
    context = {"photo": photo, "form": form, "shown": photo.large_url, "section": "photos"}
    if form.is_valid():
        try:
            name = make_preview.using(run_timeout=PREVIEW_TIMEOUT).run(photo.pk, **form.cleaned_data)
            context |= {"shown": photo.url_of(name), "is_preview": True}
        except JobFailed as error:
            context["note"] = f"The preview failed: {error.message or error}"
        except GearmanError:
            context["note"] = (
                f"No worker answered within {PREVIEW_TIMEOUT:g} seconds. This is the photo as it is."
            )
    return render(request, "gallery/photo.html", context)


@cache_control(max_age=3600)
@require_safe
def thumbnail(request: HttpRequest, folder: str, name: str) -> HttpResponse | FileResponse:
    """
    Enough for a demonstration; on a server let nginx serve this folder.

    Only thumbnails, which we wrote ourselves, have an address. The originals
    are bytes that a stranger chose, and a browser should never be shown them.
    """
    return serve(request, name, document_root=Path(settings.MEDIA_ROOT) / "thumbnails" / folder)
