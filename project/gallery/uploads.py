"""How photos come into the gallery: the files, the rows and the jobs, or nothing at all."""

from __future__ import annotations

from collections.abc import Iterable

from django.core.files import File
from django.db import transaction

from .jobs import make_thumbnails
from .models import Photo


def add_photos(files: Iterable[File]) -> list[Photo]:
    """
    Store these files as photos and enqueue a job for each.

    The jobs are rows of the same transaction: either every photo is there and
    has its job, or none is.
    """
    photos: list[Photo] = []
    try:
        # First the files, because SQLite has one writer at a time and 64 MB
        # take long to copy.
        for file in files:
            photo = Photo(title=(file.name or "photo")[:255])
            photos.append(photo)
            photo.original.save(photo.title, file, save=False)
        with transaction.atomic():
            for photo in photos:
                photo.save()
                photo.job_id = int(make_thumbnails.enqueue(photo.pk).id)
                photo.save(update_fields=["job_id"])
    except BaseException:
        for photo in photos:
            photo.original.delete(save=False)
        raise
    return photos
