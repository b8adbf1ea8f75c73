"""The upload form: several files in one field."""

from __future__ import annotations

from typing import Any

from django import forms
from django.core.files.uploadedfile import UploadedFile
from django.template.defaultfilters import filesizeformat

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
