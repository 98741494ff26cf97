"""The README is true: its commands and snippets run, on loopback where they name RunPod."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import PROJECT, Ollama, eventually, free_port
from endpoint import Endpoint

import rp_handler

README = (PROJECT / "README.md").read_text()


def blocks(language: str, word: str = "") -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    return [block for block in found if word in block]


# Every command of the README, by its beginning, and what runs it.
COMMANDS = {
    "bash tests/try.sh": "test_try_sh_prints_the_answer_of_a_real_model",
    "source .venv/bin/activate": "test_the_laptop_endpoint_prints_lines_that_work",
    "pip install openai": "tests/requirements.txt",
    "python tests/endpoint.py": "test_the_laptop_endpoint_prints_lines_that_work",
    "curl ": "test_the_curl_lines_work",
    "python rp_handler.py": "test_local.py",
    "bash tests/run.sh": "whoever runs this",
    "docker ": "test_image.py, but for the engine",
    "RUNPOD_ENDPOINT_ID=… RUNPOD_API_KEY=… bash tests/run.sh -m live   # needs an account": "owners",
    "OLLAMA_TEST_HOST=127.0.0.1:11434 bash tests/run.sh   # needs": "owners, and the workflow",
    "OLLAMA_TEST_HOST=start bash tests/run.sh": "owners, and the workflow",
}


def test_every_command_is_run_by_a_test_or_says_what_it_needs() -> None:
    lines = [
        line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines() if line
    ]
    assert [line for line in lines if not line.startswith(tuple(COMMANDS))] == []


@pytest.fixture(scope="module")
def endpoint(scripted_server: Ollama) -> Iterator[Endpoint]:
    with Endpoint(poll=1, api_key="key") as endpoint, endpoint.worker(env={}) as worker:
        worker.wait_ready()
        yield endpoint


def on(endpoint: Endpoint, text: str) -> str:
    """The snippet with the loopback endpoint in the place of RunPod's."""
    names = r"(\$RUNPOD_ENDPOINT_ID|\{os\.environ\['RUNPOD_ENDPOINT_ID'\]\})"
    changed, count = re.subn(r"https://api\.runpod\.ai/v2/" + names, endpoint.url, text)
    assert count
    return changed


ENVIRONMENT = {**os.environ, "RUNPOD_API_KEY": "key", "RUNPOD_ENDPOINT_ID": "unused"}


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not here")
@pytest.mark.parametrize(
    ("route", "answer"), [("chat/completions", "data: [DONE]"), ("runsync", '"status": "COMPLETED"')]
)
def test_the_curl_lines_work(endpoint: Endpoint, ollama: Ollama, route: str, answer: str) -> None:
    (command,) = blocks("bash", f"{route} \\")
    done = subprocess.run(
        ["bash", "-c", on(endpoint, command)], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert answer in done.stdout


def run_snippet(endpoint: Endpoint, word: str) -> subprocess.CompletedProcess[str]:
    (snippet,) = blocks("python", word)
    command = [sys.executable, "-c", on(endpoint, snippet)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)


@pytest.mark.parametrize("module", ["requests.post", "from openai import OpenAI"])
def test_the_python_snippets_work(endpoint: Endpoint, ollama: Ollama, module: str) -> None:
    done = run_snippet(endpoint, module)
    assert "Hello from the scripted model." in done.stdout, done.stderr


def test_the_snippet_waits_where_runsync_answers_before_the_job_is_done(
    endpoint: Endpoint, ollama: Ollama, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("endpoint.RUNSYNC_WAIT_MS", 1)
    ollama.script(first_ms=500)
    assert "Hello from the scripted model." in run_snippet(endpoint, "requests.post").stdout
    ollama.script(status=500, error="no room")
    assert "no room" in run_snippet(endpoint, "requests.post").stderr


def test_a_tool_is_added_as_the_readme_says(monkeypatch: pytest.MonkeyPatch) -> None:
    (snippet,) = blocks("python", "TOOLS")
    names = {"ask_model": rp_handler.ask_model}
    exec(snippet, names)
    monkeypatch.setattr(rp_handler, "TOOLS", names["TOOLS"])
    call = {"id": "1", "function": {"name": "opening_hours", "arguments": {"day": "Sunday"}}}
    message = {"type": "tool-calls", "toolCallList": [call]}
    done = rp_handler.handler({"input": {"type": "vapi_webhook", "webhook_data": {"message": message}}})
    assert done["vapi_response"]["results"][0]["result"] == "Closed."


def test_the_json_is_json() -> None:
    for block in blocks("json"):
        json.loads(block)


def test_every_row_of_inputs_gives_an_output_of_its_shape(ollama: Ollama) -> None:
    table = README[README.index("## Inputs and outputs") : README.index("## Settings")]
    rows = re.findall(r"^\| `(\{.*?\})`[^|]* \| `(\{.*\})`", table, re.MULTILINE)
    assert len(rows) == 4
    for given, shown in rows:
        output = rp_handler.handler({"input": json.loads(given)})
        assert output.keys() == json.loads(shown).keys(), given


def test_every_setting_is_listed_with_its_default() -> None:
    source = (PROJECT / "rp_handler.py").read_text()
    read = set(re.findall(r'(?:setting|environ\.get)\(\s*"([A-Z_]+)"', source)) - {"RUNPOD_ENDPOINT_ID"}
    table = README[README.index("## Settings") : README.index("## What happens when")]
    assert read == set(re.findall(r"^\| `([A-Z_]+)`", table, re.MULTILINE))
    example = (PROJECT / ".env.example").read_text()
    assert read == set(re.findall(r"^# ([A-Z_]+)=", example, re.MULTILINE))
    for name, default in re.findall(r'setting\("([A-Z_]+)", "([^"]*)"', source):
        assert re.search(rf"^\| `{name}` \| `?{re.escape(default)}`? \|", table, re.MULTILINE), name


def test_try_sh_prints_the_answer_of_a_real_model(
    worker_environment: dict[str, str], tmp_path: Path
) -> None:
    (PROJECT / ".venv").exists() or pytest.skip("without .venv it would install anew")
    done = subprocess.run(
        ["bash", str(PROJECT / "tests/try.sh")],
        cwd=tmp_path,
        env={**worker_environment, "MODELS": "llama3:latest"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"'completion_tokens': [1-9]", done.stdout)


def test_the_laptop_endpoint_prints_lines_that_work(worker_environment: dict[str, str]) -> None:
    command = [sys.executable, "tests/endpoint.py", "--port", str(free_port())]
    laptop = subprocess.Popen(
        command,
        cwd=PROJECT,
        env=worker_environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        printed = ""
        assert laptop.stdout
        while "/runsync" not in printed:
            line = laptop.stdout.readline()
            assert line, printed
            printed += line
        lines = printed[printed.index("In another terminal:") :].split("\n\n")[1:]
        for line, words in zip(lines, ["data: [DONE]", "", "COMPLETED"], strict=True):
            done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
            assert done.stdout.strip() and words in done.stdout, done.stderr
        laptop.send_signal(signal.SIGINT)
        assert laptop.wait(20) == 0
        eventually(lambda: not os.path.exists(f"/proc/{laptop.pid}"))
    finally:
        os.killpg(laptop.pid, signal.SIGKILL) if laptop.poll() is None else None
