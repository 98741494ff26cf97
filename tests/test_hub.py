"""What is published: the Hub's two files by their schema, and that they speak of this worker.

The schema: https://docs.runpod.io/hub/publishing-guide
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from typing import Any

import pytest
from conftest import PROJECT, Ollama

from rp_handler import handler

HUB = json.loads((PROJECT / ".runpod/hub.json").read_text())
TESTS = json.loads((PROJECT / ".runpod/tests.json").read_text())
INPUTS: dict[str, dict[str, Any]] = {entry["key"]: entry["input"] for entry in HUB["config"]["env"]}

OF_THE_IMAGE = {"OLLAMA_HOST"}  # a setting, but not an endpoint's
OF_OLLAMA = {"OLLAMA_CONTEXT_LENGTH", "OLLAMA_FLASH_ATTENTION", "OLLAMA_KV_CACHE_TYPE"}

HUB_SCHEMA = {
    "title": str,
    "description": str,
    "type": {"serverless"},
    "category": {"language"},
    "config": dict,
}
CONFIG_SCHEMA = {
    "runsOn": {"GPU"},
    "containerDiskInGb": int,
    "gpuCount": int,
    "gpuIds": str,
    "allowedCudaVersions": list,
    "presets": list,
    "env": list,
}
INPUT_SCHEMA = {"name": str, "type": {"string", "number", "boolean"}, "description": str}
INPUT_FIELDS = {*INPUT_SCHEMA, "default", "required", "advanced", "options"}
INPUT_FIELDS_OF = {
    "number": {"min", "max"},
    "boolean": {"trueValue", "falseValue"},
    "string": set[str](),
}
PYTHON_TYPE: dict[str, tuple[type, ...]] = {"string": (str,), "number": (int, float), "boolean": (bool,)}
POOLS = {"AMPERE_16", "AMPERE_24", "ADA_24", "AMPERE_48", "ADA_48_PRO", "AMPERE_80", "ADA_80_PRO"}


def fits(value: dict[str, Any], schema: dict[str, Any]) -> bool:
    """Whether every field of `schema` is there, of its type or among its values."""
    return all(
        value.get(field) in kind if isinstance(kind, set) else isinstance(value.get(field), kind)
        for field, kind in schema.items()
    )


def settings_of_the_worker() -> dict[str, str]:
    """The environment variables that rp_handler.py reads, with their defaults, out of its source."""
    settings: dict[str, str] = {}
    for call in ast.walk(ast.parse((PROJECT / "rp_handler.py").read_text())):
        if isinstance(call, ast.Call) and ast.unparse(call.func) in ("setting", "os.environ.get"):
            name, default = (getattr(argument, "value", None) for argument in call.args[:2])
            if name and default is not None:  # not those of `setting` itself, which are variables
                settings[str(name)] = str(default)
    return settings


def test_hub_json_has_what_the_hub_wants() -> None:
    config = HUB["config"]
    assert fits(HUB, HUB_SCHEMA) and set(HUB) <= {*HUB_SCHEMA, "iconUrl"}
    assert fits(config, CONFIG_SCHEMA) and set(config) == {*CONFIG_SCHEMA}
    assert set(config["gpuIds"].split(",")) <= POOLS
    assert all(set(preset) == {"name", "defaults"} for preset in config["presets"])


@pytest.mark.parametrize("key", INPUTS)
def test_each_input_has_a_name_a_type_and_a_fitting_default(key: str) -> None:
    field = INPUTS[key]
    assert fits(field, INPUT_SCHEMA) and set(field) <= INPUT_FIELDS | INPUT_FIELDS_OF[field["type"]]
    assert accepts(field, field["default"])


def accepts(field: dict[str, Any], value: Any) -> bool:
    if isinstance(value, bool) != (field["type"] == "boolean"):
        return False
    if "options" in field and value not in [option["value"] for option in field["options"]]:
        return False
    if field["type"] == "number" and not field["min"] <= value <= field["max"]:
        return False
    return isinstance(value, PYTHON_TYPE[field["type"]])


@pytest.mark.parametrize("preset", HUB["config"]["presets"], ids=lambda preset: preset["name"])
def test_a_preset_sets_inputs_to_values_that_they_accept(preset: dict[str, Any]) -> None:
    for key, value in preset["defaults"].items():
        assert accepts(INPUTS[key], value), key


@pytest.mark.parametrize("gigabytes", ["16 GB", "24 GB"])
def test_there_is_a_preset_for_each_size_of_gpu(gigabytes: str) -> None:
    assert [preset for preset in HUB["config"]["presets"] if preset["name"].startswith(gigabytes)]


def test_the_inputs_are_the_settings_that_the_worker_reads() -> None:
    read = {name for name in settings_of_the_worker() if not name.startswith("RUNPOD_")}
    assert set(INPUTS) == (read | OF_OLLAMA) - OF_THE_IMAGE


@pytest.mark.parametrize("key", [key for key in INPUTS if key not in OF_OLLAMA])
def test_the_hub_shows_the_workers_own_default(key: str) -> None:
    field, default = INPUTS[key], settings_of_the_worker()[key]
    shown = field["default"]
    if field["type"] == "boolean":
        shown = field["trueValue" if shown else "falseValue"]
    assert str(shown) == default


def test_the_context_length_is_the_images() -> None:
    (length,) = re.findall(r"OLLAMA_CONTEXT_LENGTH=(\d+)", (PROJECT / "Dockerfile").read_text())
    assert INPUTS["OLLAMA_CONTEXT_LENGTH"]["default"] == int(length)


def test_tests_json_has_what_the_hub_wants() -> None:
    assert set(TESTS) == {"tests", "config"}
    schema = {"name": str, "input": dict, "timeout": int}
    assert all(fits(test, schema) and set(test) == {*schema} for test in TESTS["tests"])
    schema = {"gpuTypeId": str, "gpuCount": int, "env": list, "allowedCudaVersions": list}
    assert fits(TESTS["config"], schema) and set(TESTS["config"]) == {*schema}
    assert TESTS["config"]["allowedCudaVersions"] == HUB["config"]["allowedCudaVersions"]


@pytest.mark.parametrize("test", TESTS["tests"], ids=lambda test: test["name"])
def test_the_worker_answers_what_the_hub_tests(test: dict[str, Any], ollama: Ollama) -> None:
    answer = handler({"id": "hub-test", "input": test["input"]})
    assert "error" not in answer, answer


def handler_py(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=PROJECT / ".runpod", capture_output=True, text=True, timeout=60
    )
    return done.stdout + done.stderr


def test_handler_py_runs_the_worker() -> None:
    assert "A chat needs" in handler_py("handler.py", "--test_input", '{"input": {}}')


def test_handler_py_imported_has_a_handler_and_starts_no_worker() -> None:
    said = handler_py("-c", "import sys, handler; print(handler.handler({}), 'runpod' in sys.modules)")
    assert "'status': 'error'} False\n" in said, said


def test_workflows_use_actions_of_a_certain_release() -> None:
    workflows = [path.read_text() for path in (PROJECT / ".github/workflows").glob("*.yml")]
    actions = re.findall(r"uses: (\S+)", "".join(workflows))
    assert actions and all(re.search(r"@v\d+\.\d+\.\d+$", action) for action in actions)


def test_one_release_of_ollama_is_built_in_and_imitated_and_tested_with() -> None:
    files = ["Dockerfile", "tests/ollama", ".github/workflows/tests.yml"]
    texts = "".join((PROJECT / file).read_text() for file in files)
    releases = re.findall(r'(?:ollama/ollama:|^VERSION = ")(\d+\.\d+\.\d+)', texts, re.MULTILINE)
    assert len(releases) == len(files) and len({*releases}) == 1
