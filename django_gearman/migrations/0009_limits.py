from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("django_gearman", "0008_groups"),
    ]

    operations = [
        migrations.CreateModel(
            name="LimitUse",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("digest", models.CharField(max_length=64, unique=True)),
                ("function", models.CharField(max_length=512, verbose_name="function")),
                ("key", models.CharField(blank=True, max_length=64, verbose_name="key")),
                ("book", models.TextField(blank=True, default="")),
                ("touched", models.FloatField(db_index=True)),
            ],
            options={
                "verbose_name": "use of a limit",
                "verbose_name_plural": "uses of limits",
            },
        ),
        migrations.AddField(
            model_name="jobrecord",
            name="limit_key",
            field=models.CharField(
                blank=True, default=None, editable=False, max_length=64, null=True, verbose_name="limit key"
            ),
        ),
        migrations.CreateModel(
            name="FunctionLimit",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                (
                    "function",
                    models.CharField(
                        help_text=(
                            "Name on the wire: of a @job its import path, unless it was given another."
                        ),
                        max_length=512,
                        unique=True,
                        verbose_name="function",
                    ),
                ),
                (
                    "rate",
                    models.CharField(
                        blank=True,
                        default="",
                        help_text=(
                            "How many may begin in any period, such as 10/m or 5/30s: s, m, h or d. "
                            "Empty for any."
                        ),
                        max_length=40,
                        verbose_name="rate",
                    ),
                ),
                (
                    "concurrency",
                    models.PositiveIntegerField(
                        blank=True,
                        help_text="How many may run at once. Empty for any.",
                        null=True,
                        verbose_name="at once",
                    ),
                ),
                (
                    "by_key",
                    models.BooleanField(
                        default=False,
                        help_text=(
                            "Whether it holds for each key of the jobs, as limit_key gives it, "
                            "and not for all."
                        ),
                        verbose_name="for each key",
                    ),
                ),
                ("enabled", models.BooleanField(default=True, verbose_name="enabled")),
                ("declared", models.JSONField(editable=False, null=True, verbose_name="declared")),
                ("withdrawn", models.BooleanField(default=False, editable=False, verbose_name="withdrawn")),
            ],
            options={
                "verbose_name": "limit",
                "verbose_name_plural": "limits",
                "required_db_features": ("supports_json_field",),
                "constraints": [
                    models.CheckConstraint(
                        condition=models.Q(
                            models.Q(("rate", ""), _negated=True),
                            ("concurrency__isnull", False),
                            _connector="OR",
                        ),
                        name="limit_rate_or_concurrency",
                        violation_error_message="Give a rate, or how many at once, or both.",
                    )
                ],
            },
        ),
    ]
