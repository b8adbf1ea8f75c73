"""The gallery: the app that shows what background jobs are for."""

from django.apps import AppConfig


class GalleryConfig(AppConfig):
    name = "project.gallery"
    default_auto_field = "django.db.models.BigAutoField"
