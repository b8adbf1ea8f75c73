"""
What MySQL and MariaDB need in place of partial indexes, which they make whole,
and of collations that take two names for one.
"""

from typing import Any

from django.apps.registry import Apps
from django.db import migrations
from django.db.backends.base.schema import BaseDatabaseSchemaEditor

INDEXES = {
    # What is looked for stands together, and the history beside it. Replay uses job_claim.
    "job_claim": "server_id, status, priority DESC, id",
    "job_due": "server_id, status, run_after",
}


def set_up(apps: Apps, schema_editor: BaseDatabaseSchemaEditor) -> None:
    connection: Any = schema_editor.connection
    if connection.vendor != "mysql":
        return
    # Functions, uniques and names of servers are bytes to Gearman: case, accents and spaces tell them apart.
    collation = "utf8mb4_nopad_bin" if connection.mysql_is_mariadb else "utf8mb4_0900_bin"
    for model in apps.get_app_config("django_gearman").get_models():
        table = connection.ops.quote_name(model._meta.db_table)
        schema_editor.execute(f"ALTER TABLE {table} CONVERT TO CHARACTER SET utf8mb4 COLLATE {collation}")
    _replace(apps, schema_editor, _made_by_django(connection), INDEXES)


def take_down(apps: Apps, schema_editor: BaseDatabaseSchemaEditor) -> None:
    if schema_editor.connection.vendor == "mysql":
        _replace(apps, schema_editor, INDEXES, _made_by_django(schema_editor.connection))


def _made_by_django(connection: Any) -> dict[str, str]:
    """The indexes of ``0001`` as they are without their conditions."""
    made = {"job_due": "run_after", "job_owned": "server_id, id"}
    if connection.features.supports_expression_indexes:
        made["job_claim"] = "(priority) DESC, (id)"
    return made


def _replace(
    apps: Apps, schema_editor: BaseDatabaseSchemaEditor, old: dict[str, str], new: dict[str, str]
) -> None:
    """In one statement: the foreign key of ``server_id`` wants an index all the time."""
    model = apps.get_model("django_gearman", "JobRecord")
    table = schema_editor.connection.ops.quote_name(model._meta.db_table)
    changes = [f"DROP INDEX {name}" for name in old]
    changes += [f"ADD INDEX {name} ({columns})" for name, columns in new.items()]
    schema_editor.execute(f"ALTER TABLE {table} {', '.join(changes)}")


class Migration(migrations.Migration):
    dependencies = [("django_gearman", "0003_schedule")]

    operations = [migrations.RunPython(set_up, take_down, atomic=False)]
