"""What ``0004`` does for MySQL and MariaDB, for the tables that have come since."""

from typing import Any

from django.apps.registry import Apps
from django.db import migrations
from django.db.backends.base.schema import BaseDatabaseSchemaEditor

TABLES = ("JobGroup", "FunctionLimit", "LimitUse", "Cancellation")


def convert(apps: Apps, schema_editor: BaseDatabaseSchemaEditor) -> None:
    connection: Any = schema_editor.connection
    if connection.vendor != "mysql":
        return
    collation = "utf8mb4_nopad_bin" if connection.mysql_is_mariadb else "utf8mb4_0900_bin"
    for name in TABLES:
        table = connection.ops.quote_name(apps.get_model("django_gearman", name)._meta.db_table)
        schema_editor.execute(f"ALTER TABLE {table} CONVERT TO CHARACTER SET utf8mb4 COLLATE {collation}")


class Migration(migrations.Migration):
    dependencies = [("django_gearman", "0011_no_server_constraint")]

    operations = [migrations.RunPython(convert, migrations.RunPython.noop, atomic=False)]
