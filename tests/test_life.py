"""The worker keeps working: faults injected into real processes, and what becomes of every job."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest
import requests
from conftest import eventually, own_host, processes_at
from endpoint import Endpoint, Worker

HI = [{"role": "user", "content": "Hi"}]
STREAM = {"openai_route": "/v1/chat/completions", "openai_input": {"messages": HI, "stream": True}}
ENDLESS = {"message": "Hi", "options": {"num_predict": 100_000}}
MODEL = {"models": ["llama3:latest"]}


class Worked:
    """An endpoint, a worker, and the server that the worker itself has started."""

    def __init__(self, endpoint: Endpoint, worker: Worker, host: str):
        self.endpoint, self.worker, self.host = endpoint, worker, host

    def control(self, path: str, **fields: Any) -> Any:
        url = f"http://{self.host}/test/{path}"
        answer = requests.post(url, json=fields, timeout=5) if fields else requests.get(url, timeout=5)
        return answer.json() if not fields else answer.raise_for_status()

    def state(self) -> dict[str, Any]:
        with contextlib.suppress(requests.ConnectionError):
            return dict(self.control("state"))
        return {}

    def generations(self) -> list[dict[str, Any]]:
        return [seen for seen in self.control("requests") if "messages" in seen["body"]]

    def running(self, count: int = 1) -> None:
        eventually(lambda: [seen["state"] for seen in self.generations()].count("running") == count)

    def kill_server(self) -> None:
        server = self.state()["pid"]
        os.kill(server, signal.SIGKILL)
        eventually(lambda: self.state().get("pid", server) != server)

    def ends(self, seconds: float = 20) -> int:
        eventually(lambda: self.worker.process.poll() is not None, seconds, self.worker)
        code = self.worker.process.returncode
        eventually(lambda: processes_at(self.host) == [])
        return code


@contextlib.contextmanager
def working(
    script: dict[str, Any] | None = None, ready: bool = True, **environment: str
) -> Iterator[Worked]:
    env = {
        "OLLAMA_SCRIPT": json.dumps({**MODEL, **(script or {})}),
        "REQUEST_TIMEOUT": "20",
        **environment,
    }
    with (
        own_host() as host,
        Endpoint(poll=1) as endpoint,
        endpoint.worker(env={"OLLAMA_HOST": host, **env}) as worker,
    ):
        if ready:
            worker.wait_ready()
        yield Worked(endpoint, worker, host)


# -- ready means loaded -------------------------------------------------------------------------


def test_no_job_is_taken_before_the_model_is_loaded() -> None:
    with working({"load_ms": 4000}, ready=False) as worked:
        job = worked.endpoint.run({"message": "Hi"})
        eventually(lambda: worked.endpoint.jobs[job].taken, 30)
        assert worked.state()["loaded"] == ["llama3:latest"]
        assert worked.endpoint.wait(job).status == "COMPLETED"


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        (
            {"OLLAMA_SCRIPT": '{"start_error": "no space left"}'},
            "`ollama serve` ended with 1 .*no space left",
        ),
        ({"OLLAMA_SCRIPT": '{"models": ["other:1b"]}'}, "llama3:latest could not be loaded.*other:1b"),
        (
            {"OLLAMA_SCRIPT": json.dumps({**MODEL, "load_error": "out of memory"})},
            r"llama3:latest could not be loaded\. Ollama \(500\): out of memory",
        ),
        (
            {"OLLAMA_SCRIPT": json.dumps({**MODEL, "load_ms": 60_000}), "STARTUP_TIMEOUT": "2.5"},
            r"llama3:latest could not be loaded.*STARTUP_TIMEOUT=2\.5",
        ),
        ({"OLLAMA_SCRIPT": '{"start_ms": 60000}', "STARTUP_TIMEOUT": "2.5"}, r"STARTUP_TIMEOUT=2\.5"),
        ({"PATH": "/nowhere"}, "`ollama` is not on PATH"),
    ],
)
def test_a_start_that_fails_ends_the_worker_with_one_line_why(environment: Any, words: str) -> None:
    with working(ready=False, **environment) as worked:
        assert worked.ends() == 1
        log = worked.worker.log
        assert re.search(words, log, re.DOTALL) and "Traceback" not in log
        assert len(re.findall("^error: ", log, re.MULTILINE)) == 1


# -- a server that dies -------------------------------------------------------------------------


def test_a_killed_server_is_started_again_with_its_model_loaded() -> None:
    with working() as worked:
        runner = worked.state()["runners"][0]
        worked.kill_server()
        eventually(lambda: worked.state().get("loaded") == ["llama3:latest"])
        assert not psutil.pid_exists(runner) or psutil.Process(runner).status() == psutil.STATUS_ZOMBIE
        assert worked.endpoint.runsync({"message": "Hi"})["status"] == "COMPLETED"


def test_jobs_that_sent_nothing_are_tried_again_and_streams_under_way_fail() -> None:
    with working() as worked:
        worked.control("script", repeat=-1, interval_ms=20)
        whole = [
            worked.endpoint.run({"message": "Hi", "options": {"num_predict": 200}}) for _ in range(2)
        ]
        stream = worked.endpoint.run(STREAM)
        eventually(lambda: worked.endpoint.jobs[stream].chunks)
        worked.running(3)
        worked.kill_server()
        during = worked.endpoint.run({"message": "Hi"})
        assert [worked.endpoint.wait(job).status for job in [*whole, during]] == ["COMPLETED"] * 3
        broken = worked.endpoint.wait(stream)
        assert broken.status == "FAILED" and "broke" in broken.error
        assert [worked.endpoint.jobs[job].answers for job in [*whole, stream, during]] == [1] * 4


def test_a_dead_runner_under_a_living_server_is_tried_again() -> None:
    with working() as worked:
        for job, fields in [({"message": "Hi"}, {"cut_after": 2}), (STREAM, {"cut_after": 0})]:
            worked.control("script", **fields, times=1)
            done = worked.endpoint.wait(worked.endpoint.run(job))
            assert (done.status, done.answers) == ("COMPLETED", 1)
        worked.control("script", cut_after=2, times=2)
        assert worked.endpoint.runsync({"message": "Hi"})["status"] == "FAILED", "tried more than twice"


def test_five_deaths_end_the_worker_and_lose_no_job() -> None:
    with working() as worked, ThreadPoolExecutor() as pool:
        for _ in range(4):
            worked.kill_server()  # and the next once its load is over: one that fails is final
            eventually(lambda: worked.worker.log.count("ready: ") > worked.worker.log.count("again in"))
        worked.control("script", repeat=-1, interval_ms=20)
        jobs = [worked.endpoint.run(ENDLESS), worked.endpoint.run(STREAM)]
        worked.running(2)
        pids = [worked.state()["pid"]]
        pool.submit(os.kill, pids[0], signal.SIGKILL)
        for job in [worked.endpoint.wait(job) for job in jobs]:
            assert (job.status, job.answers) == ("FAILED", 1)
        assert worked.ends() == 1
        assert "Ollama ended 5 times within 600 s" in worked.worker.log


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_no_child_outlives_the_worker(signum: signal.Signals) -> None:
    with working() as worked:
        children = psutil.Process(worked.worker.pid).children(recursive=True)
        assert len(children) >= 3, "a server, its runner and the SDK's ping process"
        worked.worker.process.send_signal(signum)
        worked.ends()
        eventually(
            lambda: not any(child.is_running() and child.status() != "zombie" for child in children)
        )


# -- limits -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def limited_worker() -> Iterator[Worked]:
    with working(REQUEST_TIMEOUT="1", MAX_TOKENS="7") as worked:
        yield worked


@pytest.fixture
def limited(limited_worker: Worked) -> Worked:
    limited_worker.control("script", times=0)
    requests.post(f"http://{limited_worker.host}/test/clear", timeout=5)
    return limited_worker


@pytest.mark.parametrize(
    "script", [{"hang_after": 0}, {"hang_after": 3}, {"repeat": -1, "interval_ms": 50}]
)
@pytest.mark.parametrize(
    "job", [ENDLESS, {"type": "vapi_webhook", "webhook_data": {"message": "Hi"}}, STREAM]
)
def test_a_job_ends_in_words_at_its_limit(
    limited: Worked, script: dict[str, Any], job: dict[str, Any]
) -> None:
    limited.control("script", **script, times=1)
    job = json.loads(json.dumps(job))
    job.get("openai_input", {})["max_tokens"] = 100_000
    if "webhook_data" in job and script.get("repeat"):
        script = {"repeat": -1, "interval_ms": 500}  # MAX_TOKENS would end it first
        limited.control("script", **script, times=1)
    done = limited.endpoint.wait(limited.endpoint.run(job))
    assert done.status == "FAILED" and "REQUEST_TIMEOUT=1 s" in done.error
    eventually(lambda: limited.generations()[0]["state"] == "closed")
    # Taken once it is known that the server does not hang, so that question meets no later script.
    assert limited.endpoint.runsync({"message": "Hi"})["status"] == "COMPLETED"


@pytest.mark.parametrize(
    "job",
    [
        {"message": "Hi"},
        {"message": "Hi", "stream": True},
        {"type": "vapi_webhook", "webhook_data": {"message": "Hi"}},
        STREAM,
        {"openai_route": "/v1/completions", "openai_input": {"prompt": "Hi"}},
    ],
)
def test_max_tokens_applies_to_every_kind_of_job(limited: Worked, job: dict[str, Any]) -> None:
    limited.control("script", repeat=-1)
    assert limited.endpoint.wait(limited.endpoint.run(job)).status == "COMPLETED"
    assert limited.control("requests")[-1]["tokens"] == 7


@pytest.mark.parametrize(("busy", "status", "tries"), [(2, "COMPLETED", 3), (3, "FAILED", 3)])
def test_a_busy_server_is_asked_three_times(busy: int, status: str, tries: int) -> None:
    with working() as worked:
        worked.control("script", status=503, error="server busy", times=busy)
        done = worked.endpoint.runsync({"message": "Hi"})
        assert done["status"] == status
        assert len(worked.generations()) == tries


# -- stops --------------------------------------------------------------------------------------


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_jobs_finish_and_takes_no_new_one(signum: signal.Signals) -> None:
    with working() as worked:
        worked.control("script", repeat=40, interval_ms=50)
        under_way = [worked.endpoint.run({"message": "Hi"}), worked.endpoint.run(STREAM)]
        worked.running(2)
        worked.worker.process.send_signal(signum)
        eventually(lambda: "stopping:" in worked.worker.log)
        late = worked.endpoint.run({"message": "Too late"})
        assert [worked.endpoint.wait(job).status for job in under_way] == ["COMPLETED"] * 2
        assert worked.ends() == 0
        assert worked.endpoint.status(late)["status"] == "IN_QUEUE"


def test_a_signal_ends_an_idle_worker_at_once() -> None:
    with working() as worked:
        worked.worker.terminate()
        assert worked.ends(3) == 0


def test_a_signal_during_the_start_ends_the_worker_and_its_server() -> None:
    with working({"load_ms": 60_000}, ready=False) as worked:
        eventually(lambda: worked.state().get("pid"))
        worked.worker.terminate()
        assert worked.ends(10) == 0


def test_a_second_signal_ends_at_once() -> None:
    with working() as worked:
        worked.control("script", hang_after=0)
        worked.endpoint.run({"message": "Hi"})
        worked.running()
        worked.worker.terminate()
        eventually(lambda: "stopping:" in worked.worker.log)
        worked.worker.terminate()
        assert worked.ends(3) == 1


# -- bad input through the loop -----------------------------------------------------------------


def nested(depth: int) -> Any:
    value: Any = "deep"
    for _ in range(depth):
        value = [value]
    return value


BAD: dict[str, tuple[Any, str]] = {
    "2 MB in a message": ({"message": "zebra " * 350_000}, "COMPLETED"),
    "10,000 messages": ({"messages": [{"role": "user", "content": "zebra"}] * 10_000}, "COMPLETED"),
    "NUL": ({"message": "zebra\0crossing"}, "COMPLETED"),
    "a lone surrogate": ({"message": "zebra \ud83d"}, "COMPLETED"),
    "a lone surrogate in what comes back": (
        {
            "type": "vapi_webhook",
            "webhook_data": {"message": {"type": "hang"}, "call_id": "zebra \udc00"},
        },
        "COMPLETED",
    ),
    "a lone surrogate in an error": ({"type": "zebra \ud83d"}, "FAILED"),
    "a 2 MB type": ({"type": "zebra" * 400_000}, "FAILED"),
    "NaN": ({"message": "zebra", "options": {"seed": math.nan}}, "FAILED"),
    "deep tools": ({"message": "zebra", "tools": nested(900)}, "FAILED"),
    "no object": ("zebra", "FAILED"),
    "a list": (["zebra"], "FAILED"),
    "a list of routes": ({"openai_route": ["zebra"], "openai_input": "zebra"}, "FAILED"),
    "a body that is a text": (
        {"openai_route": "/v1/chat/completions", "openai_input": "zebra"},
        "FAILED",
    ),
    "turns that are numbers": (
        {"openai_route": "/v1/chat/completions", "openai_input": {"messages": [1, None, "zebra"]}},
        "FAILED",
    ),
    "tool calls that are numbers": (
        {
            "type": "vapi_webhook",
            "webhook_data": {"message": {"type": "tool-calls", "toolCallList": [1, "zebra"]}},
        },
        "COMPLETED",
    ),
}


@pytest.fixture(scope="module")
def steady() -> Iterator[Worked]:
    with working() as worked:
        yield worked


@pytest.mark.parametrize(("job", "status"), BAD.values(), ids=BAD)
def test_bad_input_gets_one_answer_and_leaves_no_trace(steady: Worked, job: Any, status: str) -> None:
    (job_id,) = steady.endpoint.offer([{"id": f"bad-{time.monotonic_ns()}", "input": job}])
    done = steady.endpoint.wait(job_id)
    assert (done.status, done.answers) == (status, 1)
    if status == "FAILED":
        assert "\n" not in done.error and "Traceback" not in done.error and len(done.error) < 2500
    assert "zebra" not in steady.worker.log and "Traceback" not in steady.worker.log
    assert steady.endpoint.runsync({"message": "Hi"})["status"] == "COMPLETED"


# -- nobody reaches what they should not --------------------------------------------------------


def test_ollama_listens_on_loopback_only_even_where_its_image_says_otherwise() -> None:
    with own_host() as host, working(OLLAMA_HOST=host.replace("127.0.0.1", "0.0.0.0")) as worked:
        worked.host = host
        listening = [
            connection.laddr
            for connection in psutil.Process(worked.state()["pid"]).net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN
        ]
        assert [f"{address.ip}:{address.port}" for address in listening] == [host]
