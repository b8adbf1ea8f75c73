"""The addresses of the example site."""

from django.conf import settings
from django.contrib import admin
from django.templatetags.static import static
from django.urls import include, path
from django.utils.functional import lazy
from django.views.generic import RedirectView

from project.gallery.media import video_file
from project.gallery.views import thumbnail

urlpatterns = [
    path("admin/", admin.site.urls),
    path(settings.MEDIA_URL.lstrip("/") + "thumbnails/<slug:folder>/<str:name>", thumbnail),
    path(settings.MEDIA_URL.lstrip("/") + "videos/<slug:folder>/<str:name>", video_file),
    # Browsers ask for this on pages that name no icon, such as the admin's.
    path("favicon.ico", RedirectView.as_view(url=lazy(static, str)("gallery/icon.svg"))),
    path("", include("project.gallery.urls")),
]
