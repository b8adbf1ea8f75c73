from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("django_gearman", "0006_window"),
    ]

    operations = [
        migrations.AddField(
            model_name="jobattempt",
            name="log",
            field=models.TextField(blank=True, default="", verbose_name="log"),
        ),
        migrations.AddField(
            model_name="jobrecord",
            name="log",
            field=models.TextField(blank=True, default="", verbose_name="log"),
        ),
    ]
