"""The gallery's jobs. django_gearman finds this file because the app is installed."""

from __future__ import annotations

from typing import Any

from django_gearman import JobContext, job

from .models import Photo


@job(takes_context=True, queue_name="images")
def make_thumbnails(context: JobContext, photo_id: int) -> dict[str, Any]:
    """
    Write every thumbnail of a photo.

    Running twice is harmless, as it must be: a worker that dies in the middle
    leaves the job to the next one.
    """
    # Every web process imports this file in order to enqueue; only workers
    # need Pillow.
    from .thumbnails import write_thumbnails

    photo = Photo.objects.get(pk=photo_id)
    made = write_thumbnails(
        photo.original.path, photo.thumbnails_path, Photo.SIZES, report=context.set_progress
    )
    Photo.objects.filter(pk=photo_id).update(width=made.width, height=made.height)
    context.logger.info("%d files of a photo of %d x %d", len(made.files), made.width, made.height)
    return {"width": made.width, "height": made.height, "files": made.files}


@job(name="reverse", raw=True)
def reverse(workload: bytes) -> bytes:
    """The example of every Gearman tutorial, for clients in any language."""
    return workload[::-1]
