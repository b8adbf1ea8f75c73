"""The gallery's jobs. django_gearman finds this file because the app is installed."""

from __future__ import annotations

import shutil
from typing import Any

from django.conf import settings
from django.core.mail import send_mail
from django.db.models import F

from django_gearman import Discard, JobContext, job
from django_gearman.exceptions import JobCancelled

from .models import Photo, Upload, Video


# A JPEG of a few MiB can be made to take hours: as many layers as one likes, of nothing, over one picture.
@job(takes_context=True, queue_name="images", timeout=120)
def make_thumbnails(context: JobContext, photo_id: int) -> dict[str, Any]:
    """
    Write every thumbnail of a photo.

    Running twice is harmless, as it must be: a worker that dies in the middle
    leaves the job to the next one.
    """
    # Every web process imports this file in order to enqueue; only workers
    # need Pillow.
    from .thumbnails import write_thumbnails

    photo = Photo.objects.get(pk=photo_id)
    made = write_thumbnails(
        photo.original.path, photo.thumbnails_path, photo.sizes, report=context.set_progress
    )
    if not Photo.objects.filter(pk=photo_id).update(width=made.width, height=made.height):
        raise _gone(photo)
    context.logger.info("%d files of a photo of %d x %d", len(made.files), made.width, made.height)
    return {"width": made.width, "height": made.height, "files": made.files}


# One at a time of each photo: two would take each other's files away.
@job(queue_name="images", timeout=120, concurrency=1, limit_key="photo_id")
def render_again(photo_id: int, large: int, quality: int) -> int:
    """Write the thumbnails of a photo once more, the largest in another size; their bytes."""
    from .thumbnails import write_thumbnails

    photo = Photo.objects.filter(pk=photo_id).first()
    if photo is None:
        raise Discard("The photo was deleted.")
    before, photo.large = photo.large, large
    made = write_thumbnails(photo.original.path, photo.thumbnails_path, photo.sizes, quality=quality)
    # The pages name the new ones from here on.
    if not Photo.objects.filter(pk=photo_id).update(large=large, edition=F("edition") + 1):
        raise _gone(photo)
    for path in photo.thumbnails_path.glob(f"{before}.*") if before != large else ():
        path.unlink(missing_ok=True)
    return sum(made.files.values())


@job
def add_up(sizes: list[int]) -> int:
    """What follows a group that succeeded: it gets the members' values."""
    return sum(sizes)


@job(takes_context=True)
def mail_summary(context: JobContext) -> str:
    """What follows a group that has ended, however: its subject line, once it is mailed."""
    group = context.group
    assert group is not None, "it is enqueued as on_complete alone"
    subject = f"{group.successful} of {group.total} photos were rendered again"
    lines = [f"{subject}."]
    if group.failed:
        lines.append("\nThese were not:\n")
    for result in group:
        lines += [f"- job {result.id}: {error.message or 'cancelled'}" for error in result.errors[-1:]]
    send_mail(subject, "\n".join(lines), None, [settings.GALLERY_MAIL_TO])
    return subject


@job(queue_name="images", timeout=20)
def make_preview(photo_id: int, look: str, crop: str) -> str:
    """Write a preview beside the thumbnails of a photo, while a view waits; the file's name."""
    from .previews import write_preview

    photo = Photo.objects.get(pk=photo_id)
    name = f"preview-{look}-{crop}.jpg"
    write_preview(photo.original.path, photo.folder_path / name, look, crop)
    if not Photo.objects.filter(pk=photo_id).exists():
        raise _gone(photo)
    return name


@job(takes_context=True, queue_name="video", unique="video_id", timeout=3600, max_attempts=3)
def make_web_video(context: JobContext, video_id: int) -> dict[str, Any]:
    """
    Write poster and web version of a video, which may take minutes.

    A worker that dies leaves it to the next, twice; a file that is no video
    would be none the next time either.
    """
    # Only workers need PyAV.
    from .videos import Limits, UnreadableVideo, duration, write_web_video

    video = Video.objects.filter(pk=video_id).first()
    if video is None:
        raise Discard("The video was deleted.")

    told = -1

    def report(done: int, total: int) -> None:
        nonlocal told
        # Asked between two frames, so that nothing is cut off inside FFmpeg.
        if context.cancelled:
            raise JobCancelled
        if done > told:
            told = done
            context.set_progress(done, total)
            if not Video.objects.filter(pk=video_id).exists():
                raise _gone(video)

    try:
        made = write_web_video(
            video.original.path,
            video.folder_path,
            Video.scratch_path(),
            Limits(**getattr(settings, "VIDEO_LIMITS", {})),
            report=report,
        )
    except UnreadableVideo as error:
        raise Discard(str(error)) from error
    kept = Video.objects.filter(pk=video_id).update(
        width=made.width, height=made.height, seconds=made.seconds, notes=" ".join(made.notes)
    )
    if not kept:
        raise _gone(video)
    context.logger.info("%s of video at %d x %d", duration(made.seconds), made.width, made.height)
    return {"width": made.width, "height": made.height, "seconds": made.seconds, "sound": made.sound}


def _gone(upload: Upload) -> Discard:
    """
    What to raise when the row went while its files were written.

    Those that went with it were the ones of before; no row leads to these.
    """
    shutil.rmtree(upload.folder_path, ignore_errors=True)
    return Discard(f"The {upload._meta.verbose_name} was deleted meanwhile.")


@job(name="reverse", raw=True)
def reverse(workload: bytes) -> bytes:
    """The example of every Gearman tutorial, for clients in any language."""
    return workload[::-1]
