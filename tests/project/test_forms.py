from __future__ import annotations

import pytest
from django.utils.datastructures import MultiValueDict

from project.gallery import forms
from project.gallery.forms import UploadForm
from tests.project.images import upload


def form(*files: object) -> UploadForm:
    return UploadForm({}, MultiValueDict({"photos": list(files)} if files else {}))


class TestUploadForm:
    def test_one_file_is_a_list_of_one(self):
        checked = form(upload("a.jpg"))

        assert checked.is_valid()
        assert [file.name for file in checked.cleaned_data["photos"]] == ["a.jpg"]

    def test_all_files_are_kept_in_order(self):
        checked = form(*(upload(f"{n}.jpg") for n in range(4)))

        assert checked.is_valid()
        assert [file.name for file in checked.cleaned_data["photos"]] == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]

    def test_none_is_refused(self):
        assert form().errors["photos"] == ["Please choose a photo first."]

    def test_empty_file_is_refused(self):
        assert form(upload(), upload(content=b"")).errors["photos"] == [
            "A file without content cannot be a photo."
        ]

    def test_too_many_are_refused(self):
        too_many = [upload(content=b"x")] * (forms.MAX_PHOTOS + 1)
        assert form(*too_many).errors["photos"] == ["Please choose at most 50 photos at a time."]

    def test_too_large_is_refused_by_its_name(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(forms, "MAX_BYTES", 1024)
        (error,) = form(upload("big.jpg", b"x" * 2048)).errors["photos"]
        assert error.replace("\xa0", " ") == "“big.jpg” has 2.0 KB; a photo may have 1.0 KB."

    def test_field_takes_several_files(self):
        assert "multiple" in str(UploadForm()["photos"])
