"""
What the gallery keeps: one row per photo.

The row knows where the files lie and which job makes the thumbnails. It does
not know how they are made, which is ``thumbnails.py``, nor how far the job is,
which is django_gearman's ``JobRecord``.
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


def original_path(photo: Photo, filename: str) -> str:
    # Nothing of the visitor's name, and no suffix that would give it a type.
    return f"originals/{photo.key.hex}"


class Photo(models.Model):
    """A photo that a visitor uploaded."""

    SIZES: ClassVar[tuple[int, ...]] = (160, 480, 1280)
    """Longest side of each thumbnail, in pixels."""

    key = models.UUIDField(default=uuid.uuid4, unique=True, editable=False)
    """Names the photo's files, so that nobody finds them by counting."""

    title = models.CharField(max_length=255)
    """The file's name as the visitor called it; only ever shown."""

    original = models.FileField(upload_to=original_path, editable=False)
    uploaded_at = models.DateTimeField(auto_now_add=True)

    job_id = models.BigIntegerField(null=True, editable=False)
    """
    Primary key of the JobRecord. No foreign key: records are pruned some day,
    and the photo stays.
    """

    width = models.PositiveIntegerField(null=True, editable=False)
    """Pixels, as shown; null until the thumbnails are made."""

    height = models.PositiveIntegerField(null=True, editable=False)

    class Meta:
        ordering = ["-pk"]

    def __str__(self) -> str:
        return self.title

    @property
    def thumbnails_name(self) -> str:
        """The folder of the thumbnails, below MEDIA_ROOT."""
        return f"thumbnails/{self.key.hex}"

    @property
    def thumbnails_path(self) -> Path:
        return Path(default_storage.path(self.thumbnails_name))

    def thumbnail_url(self, size: int, extension: str) -> str:
        return default_storage.url(f"{self.thumbnails_name}/{size}.{extension}")

    @property
    def medium_url(self) -> str:
        return self.thumbnail_url(self.SIZES[1], "jpg")

    @property
    def large_url(self) -> str:
        return self.thumbnail_url(self.SIZES[-1], "jpg")

    @property
    def jpeg_srcset(self) -> str:
        return self._srcset("jpg")

    @property
    def webp_srcset(self) -> str:
        return self._srcset("webp")

    def _srcset(self, extension: str) -> str:
        return ", ".join(
            f"{self.thumbnail_url(size, extension)} {self._width_of(size)}w" for size in self.SIZES
        )

    def _width_of(self, size: int) -> int:
        """Pixels that a thumbnail of this size is wide: upright ones are narrower than ``size``."""
        if self.width is None or self.height is None:
            return size
        scale = min(1, size / max(self.width, self.height))
        return max(1, round(self.width * scale))


@receiver(post_delete, sender=Photo)
def delete_files(sender: type[Photo], instance: Photo, **kwargs: Any) -> None:
    """The files go once the row is gone for good."""

    def delete() -> None:
        instance.original.delete(save=False)
        shutil.rmtree(instance.thumbnails_path, ignore_errors=True)

    transaction.on_commit(delete)
