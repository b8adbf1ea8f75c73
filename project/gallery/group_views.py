"""Photos rendered again together: the form's answer, and a page that follows the group."""

from __future__ import annotations

from django.conf import settings
from django.contrib import messages
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseRedirect, StreamingHttpResponse
from django.shortcuts import redirect, render
from django.template.loader import render_to_string
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_POST, require_safe

from django_gearman import GroupResult, group
from django_gearman.exceptions import GroupDoesNotExist, ResponseTimeout

from . import streams
from .cards import GroupCard, group_card
from .forms import RenderForm
from .jobs import add_up, mail_summary, render_again
from .views import numbers


@require_POST
def render_photos(request: HttpRequest) -> HttpResponseRedirect:
    form = RenderForm(request.POST)
    pks = form.numbers() if form.is_valid() else []
    if not pks:
        reasons = [reason for errors in form.errors.values() for reason in errors]
        messages.error(request, " ".join(reasons) or "There are no photos yet.")
        return redirect("gallery:index")
    large, quality = form.cleaned_data["large"], form.cleaned_data["quality"]
    made = group(render_again.si(pk, large, quality) for pk in pks).enqueue(
        on_success=add_up.s(), on_complete=mail_summary.si()
    )
    return redirect("gallery:group", made.id)


@never_cache
@require_safe
def group_page(request: HttpRequest, pk: int) -> HttpResponse:
    context = {"card": group_card(_find(pk)), "section": "photos", "mail_to": settings.GALLERY_MAIL_TO}
    return render(request, "gallery/group.html", context)


@require_POST
def cancel(request: HttpRequest, pk: int) -> HttpResponseRedirect:
    try:
        if not _find(pk).cancel():
            messages.info(request, "All of it had ended already.")
    except GroupDoesNotExist as error:
        raise Http404 from error
    except ResponseTimeout:
        messages.warning(request, "It will be cancelled once its job server is there again.")
    return redirect("gallery:group", pk)


@never_cache
@require_safe
def card_list(request: HttpRequest) -> HttpResponse:
    """The card of ``?group=1`` as it is now."""
    return HttpResponse("".join(_cards_by_id(numbers(request, "group"))[0].values()))


@require_safe
async def stream(request: HttpRequest) -> StreamingHttpResponse:
    """The same again and again, as it changes."""
    pks = numbers(request, "group")
    return streams.stream(request, lambda: _cards_by_id(pks))


def _cards_by_id(pks: list[int]) -> tuple[dict[str, str], bool]:
    found: list[GroupCard] = []
    for pk in pks:
        try:
            found.append(group_card(GroupResult.find(pk)))
        except GroupDoesNotExist:
            pass  # pruned; its card goes, which no HTML tells the page
    context = {"mail_to": settings.GALLERY_MAIL_TO}
    html = {f"group-{pk}": "" for pk in pks} | {
        f"group-{card.group.id}": render_to_string("gallery/group_card.html", context | {"card": card})
        for card in found
    }
    return html, all(card.is_finished for card in found)


def _find(pk: int) -> GroupResult[list[int]]:
    try:
        return GroupResult.find(pk)
    except GroupDoesNotExist as error:
        raise Http404 from error
