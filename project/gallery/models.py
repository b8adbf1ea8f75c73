"""
What the gallery keeps: one row per photo, and one per video.

The row knows where the files lie and which job makes the others of the
original. It does not know how they are made, which is ``thumbnails.py`` and
``videos.py``, nor how far the job is, which is django_gearman's ``JobRecord``.
"""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path
from typing import Any, ClassVar

from django.core.files.storage import default_storage
from django.db import models, transaction
from django.db.models.signals import post_delete
from django.dispatch import receiver

from django_gearman import JobResult
from django_gearman.models import JobRecord


def original_path(upload: Upload, filename: str) -> str:
    # Nothing of the visitor's name, and no suffix that would give it a type.
    return f"originals/{upload.key.hex}"


class Upload(models.Model):
    """A file that a visitor uploaded."""

    FOLDER: ClassVar[str]
    """Below MEDIA_ROOT, with a folder in it for each upload."""

    key = models.UUIDField(default=uuid.uuid4, unique=True, editable=False)
    """Names the files, so that nobody finds them by counting."""

    title = models.CharField(max_length=255)
    """The file's name as the visitor called it; only ever shown."""

    original = models.FileField(upload_to=original_path, editable=False)
    uploaded_at = models.DateTimeField(auto_now_add=True)

    job_id = models.BigIntegerField(null=True, editable=False)
    """
    Primary key of the JobRecord. No foreign key: records are pruned some day,
    and the upload stays.
    """

    width = models.PositiveIntegerField(null=True, editable=False)
    """Pixels, as shown; null until the job has succeeded."""

    height = models.PositiveIntegerField(null=True, editable=False)

    class Meta:
        abstract = True
        ordering = ["-pk"]

    def __str__(self) -> str:
        return self.title

    @property
    def folder_name(self) -> str:
        """Where what is made of it lies, below MEDIA_ROOT."""
        return f"{self.FOLDER}/{self.key.hex}"

    @property
    def folder_path(self) -> Path:
        return Path(default_storage.path(self.folder_name))

    def url_of(self, name: str) -> str:
        return default_storage.url(f"{self.folder_name}/{name}")

    def job(self) -> JobResult[Any] | None:
        """Its job; None if there is no record of it any more."""
        record = JobRecord.objects.filter(pk=self.job_id).first()
        return None if record is None else JobResult(record)


class Photo(Upload):
    """A photo, and its thumbnails."""

    FOLDER = "thumbnails"

    SIZES: ClassVar[tuple[int, ...]] = (160, 480, 1280)
    """Longest side of each thumbnail, in pixels, until it is rendered again."""

    large = models.PositiveIntegerField(default=SIZES[-1], editable=False)
    """That of the largest."""

    edition = models.PositiveIntegerField(default=0, editable=False)
    """How often it was rendered again; a part of addresses, so that no browser shows what it kept."""

    class Meta(Upload.Meta):
        pass

    @property
    def sizes(self) -> tuple[int, ...]:
        return (*self.SIZES[:-1], self.large)

    @property
    def thumbnails_path(self) -> Path:
        return self.folder_path

    def thumbnail_url(self, size: int, extension: str) -> str:
        url = self.url_of(f"{size}.{extension}")
        return f"{url}?{self.edition}" if self.edition else url

    @property
    def medium_url(self) -> str:
        return self.thumbnail_url(self.SIZES[1], "jpg")

    @property
    def large_url(self) -> str:
        return self.thumbnail_url(self.large, "jpg")

    @property
    def jpeg_srcset(self) -> str:
        return self._srcset("jpg")

    @property
    def webp_srcset(self) -> str:
        return self._srcset("webp")

    def _srcset(self, extension: str) -> str:
        return ", ".join(
            f"{self.thumbnail_url(size, extension)} {self._width_of(size)}w" for size in self.sizes
        )

    def _width_of(self, size: int) -> int:
        """Pixels that a thumbnail of this size is wide: upright ones are narrower than ``size``."""
        if self.width is None or self.height is None:
            return size
        scale = min(1, size / max(self.width, self.height))
        return max(1, round(self.width * scale))


class Video(Upload):
    """A video, its poster and its version for the web."""

    FOLDER = "videos"

    WEB, POSTER = "web.mp4", "poster.jpg"
    """Names of its files."""

    SCRATCH: ClassVar[str] = "videos/.unfinished"
    """Where files lie that are being written, below MEDIA_ROOT; no address leads there."""

    seconds = models.FloatField(null=True, editable=False)
    """Its length; null until the job has succeeded."""

    notes = models.TextField(blank=True, editable=False)
    """What the visitor is told of what was left out."""

    class Meta(Upload.Meta):
        pass

    @classmethod
    def scratch_path(cls) -> Path:
        return Path(default_storage.path(cls.SCRATCH))

    @property
    def poster_url(self) -> str:
        return self.url_of(self.POSTER)

    @property
    def web_url(self) -> str:
        return self.url_of(self.WEB)


@receiver(post_delete, sender=Photo)
@receiver(post_delete, sender=Video)
def delete_files(sender: type[Upload], instance: Upload, **kwargs: Any) -> None:
    """The files go once the row is gone for good; a job finds out by itself."""

    def delete() -> None:
        instance.original.delete(save=False)
        shutil.rmtree(instance.folder_path, ignore_errors=True)

    transaction.on_commit(delete)
