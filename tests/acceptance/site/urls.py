from django.urls import path

from . import views

urlpatterns = [
    path("enqueue/", views.enqueue),
    path("enqueue-and-raise/", views.enqueue_and_raise),
    path("insist/", views.insist),
    path("run/", views.run),
]
