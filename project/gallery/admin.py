"""Photos and videos in the admin, each with the way to its job."""

from __future__ import annotations

from django.contrib import admin
from django.http import HttpRequest
from django.urls import reverse
from django.utils.html import format_html

from .models import Photo, Upload, Video

LINKED_PICTURE = '<a href="{}"><img src="{}" alt="Open {}" height="80"></a>'


class UploadAdmin(admin.ModelAdmin):
    search_fields = ["title"]
    list_per_page = 50

    def has_add_permission(self, request: HttpRequest) -> bool:
        # Only an upload in the gallery stores a file and enqueues its job.
        return False

    @admin.display(description="job record", ordering="job_id", empty_value="-")
    def job(self, upload: Upload) -> str | None:
        if upload.job_id is None:
            return None
        url = reverse("admin:django_gearman_jobrecord_change", args=[upload.job_id])
        return format_html('<a href="{}">Job {}</a>', url, upload.job_id)


@admin.register(Photo)
class PhotoAdmin(UploadAdmin):
    list_display = ["title", "thumbnail", "job", "uploaded_at"]
    readonly_fields = ["thumbnail", "job", "width", "height", "uploaded_at"]

    @admin.display(empty_value="-")
    def thumbnail(self, photo: Photo) -> str | None:
        if photo.width is None:
            return None
        small = photo.thumbnail_url(Photo.SIZES[0], "jpg")
        return format_html(LINKED_PICTURE, photo.large_url, small, photo)


@admin.register(Video)
class VideoAdmin(UploadAdmin):
    list_display = ["title", "poster", "job", "uploaded_at"]
    readonly_fields = ["poster", "job", "width", "height", "seconds", "notes", "uploaded_at"]

    @admin.display(empty_value="-")
    def poster(self, video: Video) -> str | None:
        if video.width is None:
            return None
        return format_html(LINKED_PICTURE, video.web_url, video.poster_url, video)
