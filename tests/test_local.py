"""The worker on a laptop: `rp_handler.py` as a process, with a real model and a server of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import PROJECT, TESTS, WORKER, Ollama, eventually, free_port, processes_at, serving


def run(*args: str, env: dict[str, str], cwd: Path = PROJECT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*WORKER, *args], env=env, cwd=cwd, capture_output=True, text=True, timeout=60)


def result_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    found = re.search(r"Job result: (\{.*\})", done.stdout)
    assert found, done.stdout + done.stderr
    output = eval(found[1], {"__builtins__": {}})["output"]  # the SDK prints Python's form
    return dict(output)


def test_importing_the_handler_imports_no_sdk() -> None:
    code = "import sys, rp_handler; sys.exit('runpod' in sys.modules or 'requests' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT).returncode == 0


def test_test_input_json_is_answered_by_the_real_model(worker_environment: dict[str, str]) -> None:
    done = run(env={**worker_environment, "MAX_TOKENS": "64"})  # the SDK cuts long results in its log
    assert done.returncode == 0, done.stderr
    output = result_of(done)
    assert output["response"].strip()
    assert output["usage"]["completion_tokens"] > 0
    assert output["timings"]["total_s"] > 0
    assert processes_at(worker_environment["OLLAMA_HOST"]) == []


def test_test_input_is_answered_and_its_server_found(scripted_server: Ollama) -> None:
    scripted_server.script(tokens=["Here", " I", " am"])
    done = run("--test_input", '{"input": {"message": "Hi"}}', env={**os.environ})
    assert done.returncode == 0
    assert result_of(done)["response"] == "Here I am"
    assert scripted_server.answers(), "the worker ended a server that is not its own"


@pytest.mark.parametrize(
    ("test_input", "words"),
    [
        ('{"input": {"type": "sing"}}', "Unknown type 'sing'"),
        ('{"input": {"message": "Hi", "model": "nope"}}', "not found; installed: "),
        ('{"input": {"message": "Hi", "stream": true}}', "STREAMING"),
        ('{"input": ', "must be JSON"),
        ("[1]", "must be JSON"),
        ("{}", "must be JSON"),
    ],
)
def test_a_job_that_fails_exits_1_with_one_clear_line(
    ollama: Ollama, test_input: str, words: str
) -> None:
    done = run("--test_input", test_input, env={**os.environ})
    assert done.returncode == 1
    said = done.stdout + done.stderr
    assert words in said and "Traceback" not in said


def test_without_any_ollama_it_says_how_to_get_one() -> None:
    without = os.pathsep.join(
        part for part in os.environ["PATH"].split(os.pathsep) if part != str(TESTS)
    )
    done = run(env={**os.environ, "PATH": without, "OLLAMA_HOST": f"127.0.0.1:{free_port()}"})
    assert done.returncode == 1
    assert "https://ollama.com/download" in done.stderr and "Traceback" not in done.stderr


def test_no_server_is_started_but_on_loopback(worker_environment: dict[str, str]) -> None:
    done = run(env={**worker_environment, "OLLAMA_HOST": "192.0.2.1:11434"})
    assert done.returncode == 1
    assert "loopback only" in done.stderr


def test_a_server_that_does_not_start_is_told_with_its_own_words(
    worker_environment: dict[str, str],
) -> None:
    done = run(env={**worker_environment, "OLLAMA_SCRIPT": '{"start_error": "no space left on device"}'})
    assert done.returncode == 1
    assert "`ollama serve` ended with 1" in done.stderr
    assert "no space left on device" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("MAX_CONCURRENCY", "0", "a whole number from 1 to 2,000,000"),
        ("MAX_CONCURRENCY", "x", "a whole number from 1 to 2,000,000"),
        ("MAX_TOKENS", "1.5", "a whole number from 1 to 2,000,000"),
        ("REQUEST_TIMEOUT", "-1", "seconds above 0, 2,000,000 at most"),
        ("REQUEST_TIMEOUT", "nan", "seconds above 0, 2,000,000 at most"),
        ("STARTUP_TIMEOUT", "inf", "seconds above 0, 2,000,000 at most"),
        ("REQUEST_TIMEOUT", "1e10", "seconds above 0, 2,000,000 at most"),
        ("STREAMING", "maybe", "true or false"),
        ("OLLAMA_HOST", "https://example.com", "host:port, spoken to over http"),
        ("OLLAMA_HOST", "127.0.0.1:x", "host:port, spoken to over http"),
        ("OLLAMA_HOST", "127.0.0.1:0", "host:port, spoken to over http"),
        ("OLLAMA_HOST", "127.0.0.1:70000", "host:port, spoken to over http"),
        ("OLLAMA_HOST", "a b:1", "host:port, spoken to over http"),
        ("OLLAMA_HOST", "me@host:1", "host:port, spoken to over http"),
        ("OLLAMA_HOST", "http://host/path", "host:port, spoken to over http"),
        ("OLLAMA_CONTEXT_LENGTH", "0", "a whole number from 1 to 2,000,000"),
        ("RUNPOD_LOG_LEVEL", "loud", "DEBUG, INFO, WARN or ERROR"),
    ],
)
def test_a_setting_that_cannot_be_used_stops_the_start(name: str, value: str, words: str) -> None:
    done = run(env={**os.environ, name: value})
    assert done.returncode == 1
    assert done.stderr == f"{name} must be {words}, not {value!r}.\n"


def test_settings_come_from_dot_env_and_the_real_environment_wins(tmp_path: Path) -> None:
    (tmp_path / "rp_handler.py").write_text((PROJECT / "rp_handler.py").read_text())
    (tmp_path / ".env").write_text("MAX_TOKENS=77\nMAX_CONCURRENCY=3\n")
    code = "import rp_handler as r; print(r.MAX_TOKENS, r.MAX_CONCURRENCY)"
    env = {**os.environ, "MAX_CONCURRENCY": "5"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.stdout.split() == ["77", "5"]


@pytest.mark.parametrize("level", ["warning", "", "INFO ", "Error"])
def test_a_log_level_is_read_as_people_write_it(scripted_server: Ollama, level: str) -> None:
    done = run(
        "--test_input", '{"input": {"message": "Hi"}}', env={**os.environ, "RUNPOD_LOG_LEVEL": level}
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr


def test_a_dot_env_that_is_no_text_stops_the_start_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "rp_handler.py").write_text((PROJECT / "rp_handler.py").read_text())
    (tmp_path / ".env").write_bytes("SYSTEM_PROMPT=Grüße".encode("latin-1"))
    done = subprocess.run(
        [sys.executable, "rp_handler.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (1, ".env must be a text in UTF-8.\n")


@pytest.mark.parametrize(
    ("value", "address"),
    [
        ("127.0.0.1:5", ("127.0.0.1", 5)),
        ("0.0.0.0:5", ("127.0.0.1", 5)),
        ("localhost", ("localhost", 11434)),
        (":5", ("127.0.0.1", 5)),
        ("http://10.0.0.1:5", ("10.0.0.1", 5)),
        ("[::1]:5", ("::1", 5)),
        ("::1", ("::1", 11434)),
        ("[::1]", ("::1", 11434)),
        ("http://host", ("host", 80)),
        ("http://host:5/", ("host", 5)),
        ('"127.0.0.1:5"', ("127.0.0.1", 5)),
    ],
)
def test_ollama_host_is_read_as_ollama_reads_it(value: str, address: tuple[str, int]) -> None:
    from rp_handler import host_and_port

    assert host_and_port(value) == address


class Api:
    """`--rp_serve_api` as a process."""

    def __init__(self, env: dict[str, str]):
        self.url = f"http://localhost:{(port := free_port())}"
        args = ["--rp_serve_api", "--rp_api_port", str(port)]
        self.process = subprocess.Popen([*WORKER, *args], env=env, stdout=subprocess.DEVNULL)

    def runsync(self, **fields: Any) -> dict[str, Any]:
        answer = requests.post(f"{self.url}/runsync", json={"input": fields}, timeout=30)
        return dict(answer.json())

    def listens(self) -> bool:
        try:
            return requests.get(f"{self.url}/docs", timeout=5).ok
        except requests.ConnectionError:
            return False


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_the_served_api_answers_and_ends_with_its_server(
    worker_environment: dict[str, str], signum: signal.Signals
) -> None:
    api = Api(worker_environment)
    try:
        eventually(api.listens, 30)
        done = api.runsync(message="Say hello.", options={"temperature": 0, "num_predict": 5})
        assert done["status"] == "COMPLETED"
        assert done["output"]["usage"]["completion_tokens"] == 5
        failed = api.runsync(message="")
        assert failed["status"] == "FAILED" and "not empty" in failed["error"]
        assert processes_at(worker_environment["OLLAMA_HOST"])
        api.process.send_signal(signum)
        assert api.process.wait(10) == 0
        eventually(lambda: not processes_at(worker_environment["OLLAMA_HOST"]))
    finally:
        api.process.kill()
        api.process.wait()


def test_the_handler_finds_or_starts_a_server_without_main(worker_environment: dict[str, str]) -> None:
    code = """if True:
        import json, rp_handler
        job = {"input": {"message": "Hi", "options": {"temperature": 0, "num_predict": 3}}}
        print(json.dumps(rp_handler.handler(job)))
    """
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT, env=worker_environment, capture_output=True, text=True
    )
    assert json.loads(done.stdout)["usage"]["completion_tokens"] == 3, done.stderr
    eventually(lambda: not processes_at(worker_environment["OLLAMA_HOST"]))


def test_the_server_gets_what_a_worker_needs_unless_it_is_set(
    worker_environment: dict[str, str],
) -> None:
    empty = {"OLLAMA_CONTEXT_LENGTH": "", "OLLAMA_NO_CLOUD": "", "OLLAMA_NUM_PARALLEL": ""}
    for given, expected in [(empty, "4096"), ({"OLLAMA_CONTEXT_LENGTH": "1024"}, "1024")]:
        env = {**worker_environment, "MAX_CONCURRENCY": "3", **given}
        api = Api(env)
        try:
            eventually(api.listens, 30)
            state = requests.get(f"http://{env['OLLAMA_HOST']}/test/state", timeout=5).json()
            assert state["loaded"] == ["llama3:latest"]
            assert {
                "OLLAMA_HOST": env["OLLAMA_HOST"],
                "OLLAMA_KEEP_ALIVE": "-1",
                "OLLAMA_NO_CLOUD": "1",
                "OLLAMA_NUM_PARALLEL": "3",
                "OLLAMA_CONTEXT_LENGTH": expected,
            }.items() <= state["env"].items()
        finally:
            api.process.terminate()
            api.process.wait(10)


def test_a_running_server_is_used_and_left_running(worker_environment: dict[str, str]) -> None:
    with serving(
        worker_environment["OLLAMA_HOST"], OLLAMA_MODELS=worker_environment["OLLAMA_MODELS"]
    ) as ollama:
        done = run(env=worker_environment)
        assert done.returncode == 0
        assert len(ollama.requests("/api/chat")) == 1
        assert ollama.answers()


def test_a_server_that_was_found_and_has_gone_is_told_and_used_when_it_is_back(
    worker_environment: dict[str, str],
) -> None:
    host, models = worker_environment["OLLAMA_HOST"], worker_environment["OLLAMA_MODELS"]
    job = {"message": "Hi", "options": {"num_predict": 2}}
    with serving(host, OLLAMA_MODELS=models):
        api = Api(worker_environment)
        eventually(api.listens, 30)
    try:
        failed = api.runsync(**job)
        assert failed["status"] == "FAILED" and "connection to Ollama broke" in failed["error"]
        with serving(host, OLLAMA_MODELS=models):
            assert api.runsync(**job)["status"] == "COMPLETED"
    finally:
        api.process.terminate()
        api.process.wait(10)


def test_after_a_kill_the_next_run_finds_the_server_that_was_left(
    worker_environment: dict[str, str],
) -> None:
    api = Api(worker_environment)
    url = f"http://{worker_environment['OLLAMA_HOST']}/test/state"
    try:
        eventually(api.listens, 30)
        server = requests.get(url, timeout=5).json()["pid"]
    finally:
        api.process.kill()
        api.process.wait()
    try:
        assert run(env=worker_environment).returncode == 0
        assert requests.get(url, timeout=5).json()["pid"] == server
    finally:
        os.kill(server, signal.SIGTERM)
        eventually(lambda: not processes_at(worker_environment["OLLAMA_HOST"]))
