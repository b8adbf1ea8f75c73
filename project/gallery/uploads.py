"""How photos and videos come into the gallery: the files, the rows and the jobs, or nothing at all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from django.core.files import File
from django.db import transaction

from django_gearman import Job

from .jobs import make_thumbnails, make_web_video
from .models import Photo, Upload, Video


def add_photos(files: Iterable[File]) -> list[Photo]:
    """
    Store these files as photos and enqueue a job for each.

    The jobs are rows of the same transaction: either every photo is there and
    has its job, or none is.
    """
    photos: list[Photo] = []
    _add(photos, Photo, files, make_thumbnails)
    return photos


def add_videos(files: Iterable[File]) -> list[Video]:
    """The same for videos."""
    videos: list[Video] = []
    _add(videos, Video, files, make_web_video)
    return videos


def _add(uploads: list[Any], model: type[Upload], files: Iterable[File], job: Job[Any, Any]) -> None:
    try:
        # First the files, because SQLite has one writer at a time and 64 MB
        # take long to copy.
        for file in files:
            upload = model(title=(file.name or model._meta.verbose_name)[:255])
            uploads.append(upload)
            upload.original.save(upload.title, file, save=False)
        with transaction.atomic():
            for upload in uploads:
                upload.save()
                upload.job_id = int(job.enqueue(upload.pk).id)
                upload.save(update_fields=["job_id"])
    except BaseException:
        _remove(uploads)
        raise


def _remove(uploads: Sequence[Upload]) -> None:
    for upload in uploads:
        upload.original.delete(save=False)


def try_again(video: Video) -> None:
    """Another job for a video whose last one came to nothing."""
    with transaction.atomic():
        video.job_id = int(make_web_video.enqueue(video.pk).id)
        video.save(update_fields=["job_id"])
