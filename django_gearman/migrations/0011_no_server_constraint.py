"""
No constraint of the database between a job and its server's lease.

The lease is proved, and locked, in each transaction that writes the column. The database
looked it up once more for every row that came or was claimed.
"""

import django.db.models.deletion
from django.db import migrations, models
from django.db.backends.base.schema import BaseDatabaseSchemaEditor
from django.db.migrations.state import ProjectState


class AlterField(migrations.AlterField):
    """Leaves SQLite alone: there it costs next to nothing, and a copy of the table would use ids again."""

    def database_forwards(
        self,
        app_label: str,
        schema_editor: BaseDatabaseSchemaEditor,
        from_state: ProjectState,
        to_state: ProjectState,
    ) -> None:
        if schema_editor.connection.vendor != "sqlite":
            super().database_forwards(app_label, schema_editor, from_state, to_state)


class Migration(migrations.Migration):
    dependencies = [
        ("django_gearman", "0010_cancellation"),
    ]

    operations = [
        AlterField(
            model_name="jobrecord",
            name="server",
            field=models.ForeignKey(
                blank=True,
                db_constraint=False,
                db_index=False,
                null=True,
                on_delete=django.db.models.deletion.PROTECT,
                related_name="+",
                to="django_gearman.serverlease",
                verbose_name="job server",
            ),
        ),
    ]
