from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("gallery", "0002_video")]

    operations = [
        migrations.AddField(
            model_name="photo",
            name="edition",
            field=models.PositiveIntegerField(default=0, editable=False),
        ),
        migrations.AddField(
            model_name="photo",
            name="large",
            field=models.PositiveIntegerField(default=1280, editable=False),
        ),
    ]
