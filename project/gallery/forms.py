"""The forms: several photos in one field, a video, what to render again, what to try on a photo."""

from __future__ import annotations

from typing import Any

from django import forms
from django.conf import settings
from django.core.files.uploadedfile import UploadedFile
from django.template.defaultfilters import filesizeformat

from .models import Photo

MAX_BYTES = 64 * 1024 * 1024
"""Of one photo."""

MAX_PHOTOS = 50
"""In one upload."""


class MultipleFileInput(forms.ClearableFileInput):
    allow_multiple_selected = True


class PhotosField(forms.FileField):
    """
    A field of one or more files, whose cleaned value is a list.

    Whether a file is an image is not asked here: that takes as long as the
    job that will find it out.
    """

    widget = MultipleFileInput(attrs={"accept": "image/*"})

    def clean(self, data: Any, initial: Any = None) -> list[UploadedFile]:
        files = data if isinstance(data, (list, tuple)) else [data]
        if len(files) > MAX_PHOTOS:
            raise forms.ValidationError(f"Please choose at most {MAX_PHOTOS} photos at a time.")
        # An empty list is what a form without a file sends.
        return [self._clean_one(file, initial) for file in files or [None]]

    def _clean_one(self, file: Any, initial: Any) -> UploadedFile:
        cleaned = super().clean(file, initial)
        if (cleaned.content_type or "").startswith("video/"):
            raise forms.ValidationError(f"“{cleaned.name}” is a video; videos have a page of their own.")
        if cleaned.size > MAX_BYTES:
            raise forms.ValidationError(
                f"“{cleaned.name}” has {filesizeformat(cleaned.size)}; "
                f"a photo may have {filesizeformat(MAX_BYTES)}."
            )
        return cleaned


class UploadForm(forms.Form):
    photos = PhotosField(
        error_messages={
            "required": "Please choose a photo first.",
            "empty": "A file without content cannot be a photo.",
        },
    )


class VideoForm(forms.Form):
    video = forms.FileField(
        widget=forms.ClearableFileInput(attrs={"accept": "video/*"}),
        error_messages={
            "required": "Please choose a video first.",
            "empty": "A file without content cannot be a video.",
        },
    )

    def clean_video(self) -> UploadedFile:
        video: UploadedFile = self.cleaned_data["video"]
        limit = getattr(settings, "VIDEO_LIMITS", {}).get("max_bytes")
        if limit is not None and (video.size or 0) > limit:
            raise forms.ValidationError(
                f"“{video.name}” has {filesizeformat(video.size)}; a video may have {filesizeformat(limit)}."
            )
        return video


class NumberedPhotosField(forms.ModelMultipleChoiceField):
    """Photos by their numbers, of which a database takes none that is larger than its column."""

    def clean(self, value: Any) -> Any:
        for number in value or ():
            if not str(number).isdecimal() or len(str(number)) > 18:
                raise forms.ValidationError(
                    self.error_messages["invalid_pk_value"], code="invalid_pk_value", params={"pk": number}
                )
        return super().clean(value)


class RenderForm(forms.Form):
    """Thumbnails once more, of some photos or of all."""

    photos = NumberedPhotosField(Photo.objects.filter(width__isnull=False), required=False)
    large = forms.TypedChoiceField(
        label="Large pictures",
        choices=[(960, "960 pixels"), (1280, "1280 pixels"), (1920, "1920 pixels")],
        coerce=int,
        initial=1280,
    )
    quality = forms.TypedChoiceField(
        choices=[(55, "Small files"), (82, "Good"), (92, "Best")], coerce=int, initial=82
    )
    which = forms.ChoiceField(choices=[("selected", "Selected"), ("all", "All")])

    def clean(self) -> dict[str, Any]:
        cleaned = super().clean() or self.cleaned_data
        if cleaned.get("which") == "selected" and not cleaned.get("photos"):
            raise forms.ValidationError("Please select photos first.")
        return cleaned

    def numbers(self) -> list[int]:
        """The primary keys of the photos that are meant."""
        if self.cleaned_data["which"] == "selected":
            return [photo.pk for photo in self.cleaned_data["photos"]]
        return list(Photo.objects.filter(width__isnull=False).values_list("pk", flat=True))


class PreviewForm(forms.Form):
    """What ``previews.py`` knows; in the address, so that a preview can be passed on."""

    look = forms.ChoiceField(
        choices=[
            ("as-is", "As it is"),
            ("grey", "Black and white"),
            ("sepia", "Sepia"),
            ("vivid", "Vivid"),
            ("cold", "Cold"),
        ],
        widget=forms.RadioSelect,
        initial="as-is",
    )
    crop = forms.ChoiceField(
        choices=[("whole", "Whole"), ("square", "Square"), ("wide", "Wide, 16:9"), ("tall", "Tall, 4:5")],
        widget=forms.RadioSelect,
        initial="whole",
    )
