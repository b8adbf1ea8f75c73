from django.urls import path

from . import group_views, video_views, views

app_name = "gallery"

urlpatterns = [
    path("", views.index, name="index"),
    path("cards/", views.card_list, name="cards"),
    path("photos/<int:pk>/", views.photo, name="photo"),
    path("render/", group_views.render_photos, name="render"),
    path("render/<int:pk>/", group_views.group_page, name="group"),
    path("render/<int:pk>/cancel/", group_views.cancel, name="cancel_group"),
    path("render/cards/", group_views.card_list, name="group_cards"),
    path("render/stream/", group_views.stream, name="group_stream"),
    path("videos/", video_views.index, name="videos"),
    path("videos/cards/", video_views.card_list, name="video_cards"),
    path("videos/stream/", video_views.stream, name="video_stream"),
    path("videos/<int:pk>/cancel/", video_views.cancel, name="cancel_video"),
    path("videos/<int:pk>/again/", video_views.again, name="video_again"),
]
