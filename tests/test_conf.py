from __future__ import annotations

import ast
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from django.core.exceptions import ImproperlyConfigured

from django_gearman.conf import GearmanSettings, WorkerGroup, settings_for


class TestDefaults:
    @pytest.mark.parametrize("value", [{}, {"default": {}}, {"default": {}, "other": {"TIMEOUT": 5}}])
    def test_everything_has_one(self, settings: Any, value: Any) -> None:
        settings.GEARMAN = value
        assert settings_for() == GearmanSettings()

    def test_the_setting_may_be_missing(self, settings: Any) -> None:
        del settings.GEARMAN
        assert settings_for().servers == ("127.0.0.1:4730",)

    def test_aliases(self, settings: Any) -> None:
        settings.GEARMAN = {"default": {}, "other": {"SERVERS": ["a:1"]}}
        assert settings_for("other").servers == ("a:1",)
        with pytest.raises(ImproperlyConfigured, match=r"no alias 'third' \(it has 'default', 'other'\)"):
            settings_for("third")

    def test_a_changed_setting_is_read_again(self, settings: Any) -> None:
        settings.GEARMAN = {"default": {"TIMEOUT": 1}}
        assert settings_for().timeout == 1
        settings.GEARMAN = {"default": {"TIMEOUT": 2}}
        assert settings_for().timeout == 2

    def test_are_those_of_the_readme(self):
        readme = (Path(__file__).parents[1] / "README.md").read_text()
        (table,) = re.findall(r"\| key \| default \| \|\n\|[-|]+\n((?:\|.*\n)+)", readme)
        told = {}
        for row in table.splitlines():
            names, default, _ = row.strip("| ").split(" | ", 2)
            told |= dict.fromkeys(re.findall(r"`(\w+)`", names), ast.literal_eval(default.strip("`")))
        told["SERVERS"] = tuple(told["SERVERS"])
        has = GearmanSettings()
        assert told == {field.name.upper(): getattr(has, field.name) for field in fields(has)}


class TestValues:
    def test_all_that_there_are(self, settings: Any) -> None:
        settings.GEARMAN = {
            "default": {
                "SERVERS": ("one:1", "two", "[::1]:3"),
                "DATABASE": "jobs",
                "CONNECT_TIMEOUT": 0.5,
                "TIMEOUT": 1,
                "RUN_TIMEOUT": 2,
                "MAX_PACKET": 1000,
                "RECORD_FOREGROUND": False,
                "AUTODISCOVER": False,
                "KEEP_SUCCESSFUL_DAYS": 1,
                "KEEP_FAILED_DAYS": 0,
                "KEEP_FUNCTION_DAYS": {"f": 0.5, "g": None},
                "TLS_CA": "ca.pem",
                "TLS_CERTIFICATE": "a.pem",
                "TLS_KEY": "a.key",
            }
        }
        assert settings_for() == GearmanSettings(
            servers=("one:1", "two", "[::1]:3"),
            database="jobs",
            connect_timeout=0.5,
            timeout=1,
            run_timeout=2,
            max_packet=1000,
            record_foreground=False,
            autodiscover=False,
            keep_successful_days=1.0,
            keep_failed_days=None,
            keep_function_days={"f": 0.5, "g": None},
            tls_ca="ca.pem",
            tls_certificate="a.pem",
            tls_key="a.key",
        )

    def test_groups_of_workers(self, settings: Any) -> None:
        settings.GEARMAN = {
            "default": {
                "WORKERS": {
                    "video": {"PROCESSES": "2..8", "QUEUES": ["video"], "MAX_MEMORY": "500,+200"},
                    "rest": {"PROCESSES": 6, "MAX_MEMORY": 300, "MAX_JOBS": None},
                }
            }
        }
        assert settings_for().workers == {
            "video": WorkerGroup(name="video", processes=(2, 8), queues=("video",), max_memory=(500, 200)),
            "rest": WorkerGroup(name="rest", processes=(6, 6), max_memory=(300, None)),
        }

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            ([], r"GEARMAN must be a dict of aliases, not \[\]"),
            ({"SERVERS": ["a:1"]}, r"GEARMAN\['SERVERS'\] is no alias .* put it under GEARMAN\['default'\]"),
            ({"default": {}, "WORKERS": {}}, r"GEARMAN\['WORKERS'\] is no alias"),
            ({"default": {}, "timeout": 5}, r"GEARMAN\['timeout'\] is no alias"),
            ({"defualt": {}}, r"no 'default', .*\(it has 'defualt'\); is 'defualt' it, misspelt\?"),
            ({"other": {}}, r"no 'default', whose settings are used \(it has 'other'\)$"),
            ({"default": []}, r"GEARMAN\['default'\] must be a dict, not \[\]"),
            ({"default": {"SERVER": []}}, r"\['SERVER'\] is not a setting; did you mean 'SERVERS'\?"),
            ({"default": {"timeout": 1}}, "did you mean 'TIMEOUT'?"),
            ({"default": {"QQQ": 1}}, "known are SERVERS, SPREAD, DATABASE"),
            ({"default": {3: 1}}, r"\[3\] is not a setting"),
            ({"default": {"SERVERS": "127.0.0.1:4730"}}, r"\['SERVERS'\] must be a list such as"),
            ({"default": {"SERVERS": []}}, "must be a list"),
            ({"default": {"SERVERS": [4730]}}, r"\['SERVERS'\]: 4730 is not an address"),
            ({"default": {"SERVERS": ["host:port"]}}, "'host:port' is not an address such as 127.0.0.1:4730"),
            ({"default": {"SERVERS": [":4730"]}}, "is not an address"),
            ({"default": {"SERVERS": ["a:65536"]}}, "is not an address"),
            ({"default": {"SERVERS": ["::1"]}}, "is not an address"),
            ({"default": {"TIMEOUT": 0}}, r"\['TIMEOUT'\] must be a number above 0, not 0"),
            ({"default": {"TIMEOUT": "30"}}, "must be a number above 0, not '30'"),
            ({"default": {"TIMEOUT": True}}, "must be a number above 0, not True"),
            ({"default": {"TIMEOUT": float("nan")}}, "must be a number above 0, not nan"),
            ({"default": {"TIMEOUT": float("inf")}}, "must be a number above 0, not inf"),
            ({"default": {"AUTODISCOVER": 1}}, "must be True or False, not 1"),
            ({"default": {"ENQUEUE": "redis"}}, r"\['ENQUEUE'\] must be 'database' or 'wire', not 'redis'"),
            ({"default": {"KEEP_FAILED_DAYS": "7"}}, "must be a number of days, or None or 0 .*, not '7'"),
            ({"default": {"KEEP_FAILED_DAYS": True}}, "must be a number of days"),
            ({"default": {"KEEP_SUCCESSFUL_DAYS": -1}}, "must be a number of days"),
            ({"default": {"KEEP_SUCCESSFUL_DAYS": 1e9}}, "must be a number of days"),
            ({"default": {"KEEP_FUNCTION_DAYS": 7}}, "must be a dict of functions and days, not 7"),
            ({"default": {"KEEP_FUNCTION_DAYS": {"f": "7"}}}, r"\['f'\] must be a number of days"),
            ({"default": {"DATABASE": None}}, "must be a string, not None"),
            ({"default": {"JOB_TIMEOUT": 1.5}}, "must be a whole number of seconds from 1, or None, not 1.5"),
            ({"default": {"WORKERS": ["video"]}}, "must be a dict of names and groups"),
            ({"default": {"WORKERS": {"video": 2}}}, r"\['WORKERS'\]\['video'\] must be a dict, not 2"),
            (
                {"default": {"WORKERS": {"a": {"PROCESS": 2}}}},
                r"\['a'\]\['PROCESS'\] is not a setting; known",
            ),
            ({"default": {"WORKERS": {"a": {"PROCESSES": "8..2"}}}}, "'8..2' is not a number of processes"),
            ({"default": {"WORKERS": {"a": {"PROCESSES": True}}}}, "True is not a number of processes"),
            ({"default": {"WORKERS": {"a": {"THREADS": 0}}}}, "it must be a whole number from 1, not 0"),
            ({"default": {"WORKERS": {"a": {"QUEUES": "video"}}}}, "it must be a list of names, not 'video'"),
            ({"default": {"WORKERS": {"a": {"MAX_MEMORY": "-5"}}}}, "'-5' is no limit of memory"),
        ],
    )
    def test_mistakes_are_named(self, settings: Any, value: Any, message: str) -> None:
        settings.GEARMAN = value
        with pytest.raises(ImproperlyConfigured, match=message):
            settings_for()
