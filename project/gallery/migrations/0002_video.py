import uuid

from django.db import migrations, models

import project.gallery.models


class Migration(migrations.Migration):
    dependencies = [("gallery", "0001_photo")]

    operations = [
        migrations.CreateModel(
            name="Video",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("key", models.UUIDField(default=uuid.uuid4, editable=False, unique=True)),
                ("title", models.CharField(max_length=255)),
                (
                    "original",
                    models.FileField(editable=False, upload_to=project.gallery.models.original_path),
                ),
                ("uploaded_at", models.DateTimeField(auto_now_add=True)),
                ("job_id", models.BigIntegerField(editable=False, null=True)),
                ("width", models.PositiveIntegerField(editable=False, null=True)),
                ("height", models.PositiveIntegerField(editable=False, null=True)),
                ("seconds", models.FloatField(editable=False, null=True)),
                ("notes", models.TextField(blank=True, editable=False)),
            ],
            options={"ordering": ["-pk"], "abstract": False},
        ),
    ]
