"""
Indexes for a queue that is larger than memory: the next jobs of each function,
and what of it is due, without looking at the jobs of others.
"""

from typing import Any

from django.apps.registry import Apps
from django.db import migrations, models
from django.db.backends.base.schema import BaseDatabaseSchemaEditor

OLD = [
    models.Index(
        models.OrderBy(models.F("priority"), descending=True),
        models.OrderBy(models.F("id")),
        condition=models.Q(("server__isnull", True), ("status", "READY")),
        name="job_claim",
    ),
    models.Index(
        condition=models.Q(("server__isnull", True), ("status__in", ("SCHEDULED", "RETRYING"))),
        fields=["run_after"],
        name="job_due",
    ),
]
NEW = [
    models.Index(
        fields=["function", "-priority", "id", "status", "server"],
        condition=models.Q(("server__isnull", True), ("status", "READY")),
        name="job_claim",
    ),
    models.Index(
        condition=models.Q(("server__isnull", True), ("status__in", ("SCHEDULED", "RETRYING"))),
        fields=["function", "run_after", "id", "status", "server"],
        name="job_due",
    ),
]
# As migration 0004 made them, and as they are now: MySQL has no partial indexes.
OLD_OF_MYSQL = {
    "job_claim": "server_id, status, priority DESC, id",
    "job_due": "server_id, status, run_after",
}
NEW_OF_MYSQL = {
    "job_claim": "server_id, status, `function`, priority DESC, id",
    "job_due": "server_id, status, `function`, run_after, id",
}


def set_up(apps: Apps, schema_editor: BaseDatabaseSchemaEditor) -> None:
    _replace(apps, schema_editor, NEW, NEW_OF_MYSQL)


def take_down(apps: Apps, schema_editor: BaseDatabaseSchemaEditor) -> None:
    _replace(apps, schema_editor, OLD, OLD_OF_MYSQL)


def _replace(
    apps: Apps, schema_editor: BaseDatabaseSchemaEditor, new: list[models.Index], of_mysql: dict[str, str]
) -> None:
    connection: Any = schema_editor.connection
    model = apps.get_model("django_gearman", "JobRecord")
    if connection.vendor == "mysql":
        # In one statement: the foreign key of ``server_id`` wants an index all the time.
        table = connection.ops.quote_name(model._meta.db_table)
        changes = [f"DROP INDEX {name}" for name in of_mysql]
        changes += [f"ADD INDEX {name} ({columns})" for name, columns in of_mysql.items()]
        schema_editor.execute(f"ALTER TABLE {table} {', '.join(changes)}")
        return
    for index in new:
        # Of both it is the name alone that matters to what goes.
        schema_editor.remove_index(model, index)
        schema_editor.add_index(model, index)


class Migration(migrations.Migration):
    dependencies = [("django_gearman", "0005_unique_key")]

    operations = [
        migrations.AddField(
            model_name="jobrecord",
            name="interruptions",
            field=models.PositiveIntegerField(default=0, verbose_name="interruptions"),
        ),
        migrations.SeparateDatabaseAndState(
            database_operations=[migrations.RunPython(set_up, take_down, atomic=False)],
            state_operations=[
                *(migrations.RemoveIndex("jobrecord", index.name) for index in OLD),
                *(migrations.AddIndex("jobrecord", index) for index in NEW),
            ],
        ),
    ]
