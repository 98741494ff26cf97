"""Everything at once: random jobs and cancels, a server that dies, hangs and lags, a bad platform.

Whatever the storm was like, it leaves one answer a job, whole streams and a worker as good as new.
A run prints its seed; STORM_SEED repeats its choices, though not what the machine makes of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import psutil
from conftest import eventually
from endpoint import Job
from test_life import HI, Worked, working

SECONDS, JOBS = 20, 260
WORDS = [f"{number} " for number in range(50)]
STEADY = {"tokens": WORDS, "interval_ms": 8}
SLOW = {"tokens": WORDS, "first_ms": 2500, "interval_ms": 100}
# How many of a channel's calls meet a fault. A stalled post is given up by the worker after 5 s, and
# what it may try for 30 s must be able to get through.
POSTS, POLLS = {"job-stream": 0.05, "job-done": 0.2}, {"job-take": 0.1, "job-stop": 0.2, "ping": 0.3}
# What a job may fail with, given as an answer or by a tool.
REASONS = re.compile(
    "(ask_model failed: )?(The connection to Ollama broke|Ollama|Not done within REQUEST_TIMEOUT=2 s)"
    "|The tool took longer"
)

# ---- Jobs ----


class Kind(NamedTuple):
    input: Callable[[int], dict[str, Any]]  # of a job that asks for so many words
    said: Callable[[list[Any]], str]  # in the chunks of its answer


def chat(words: int, **more: Any) -> dict[str, Any]:
    return {"message": "Hi", "options": {"num_predict": words}, **more}


def openai(words: int, **more: Any) -> dict[str, Any]:
    body = {"messages": HI, "max_tokens": words, **more}
    return {"openai_route": "/v1/chat/completions", "openai_input": body}


def responses(words: int) -> dict[str, Any]:
    body = {"input": "Hi", "max_output_tokens": words, "stream": True}
    return {"openai_route": "/v1/responses", "openai_input": body}


def webhook(**message: Any) -> dict[str, Any]:
    return {"type": "vapi_webhook", "webhook_data": {"message": message.get("text", message)}}


def said_in_frames(chunks: list[str]) -> str:
    frames = [json.loads(data) for data in re.findall("^data: ({.*)", "".join(chunks), re.MULTILINE)]
    deltas = [frame["choices"][0]["delta"] if "choices" in frame else frame for frame in frames]
    return "".join(delta.get("content") or delta.get("delta") or "" for delta in deltas)


def said_by_tool(chunks: list[Any]) -> str:
    (result,) = chunks[0]["vapi_response"]["results"]
    return result.get("result") or result["error"]


CALL = {"id": "call-1", "function": {"name": "ask_model", "arguments": {"message": "Hi"}}}
ALL = len(WORDS)
KINDS = {
    "chat": Kind(chat, lambda chunks: chunks[0]["response"]),
    "streamed chat": Kind(
        lambda words: chat(words, stream=True),
        lambda chunks: "".join(chunk.get("response", "") for chunk in chunks),
    ),
    "OpenAI": Kind(openai, lambda chunks: chunks[0]["choices"][0]["message"]["content"]),
    "streamed OpenAI": Kind(lambda words: openai(words, stream=True), said_in_frames),
    "streamed response": Kind(responses, said_in_frames),
    "VAPI text": Kind(lambda _: webhook(text="Hi"), lambda chunks: chunks[0]["vapi_response"]),
    "VAPI tool": Kind(lambda _: webhook(type="tool-calls", toolCallList=[CALL]), said_by_tool),
}
BAD = [
    "no object",
    {"type": "fax"},
    {"message": ""},
    chat(5, stream="yes"),
    chat(5, model="missing"),
    chat(5, options={"num_ctx": 99}),
    {"openai_route": "/v1/chat/completions", "openai_input": {"messages": [1]}},
    {"type": "vapi_webhook", "webhook_data": {}},
]


class Asked(NamedTuple):
    job: Job
    kind: str  # "" of a bad one
    words: int

    def check(self) -> None:
        """One answer, and no hole or doubled word in it."""
        job, chunks = self.job, [chunk for _, chunk in self.job.chunks]
        stopped = job.status in ("CANCELLED", "TIMED_OUT")
        assert job.answers == 1 or (stopped and not job.answers)
        if not self.kind:
            assert stopped or (job.status == "FAILED" and "report it" not in job.error)
            return
        text = KINDS[self.kind].said(chunks) if chunks else ""
        said, due = text.split(), "".join(WORDS[: self.words]).split()
        if job.status == "COMPLETED":
            assert job.output == chunks
            assert said == due or (self.kind == "VAPI tool" and REASONS.match(text))
        else:
            assert stopped or REASONS.match(job.error)
            assert said == due[: len(said)]


def ask(worked: Worked, dice: random.Random, kind: str, policy: Any = None) -> Asked:
    words = ALL if kind.startswith("VAPI") else dice.randint(1, ALL)
    job_input = KINDS[kind].input(words) if kind else dice.choice(BAD)
    return Asked(worked.endpoint.jobs[worked.endpoint.run(job_input, policy)], kind, words)


def one_of_each(worked: Worked, dice: random.Random) -> None:
    asked = [ask(worked, dice, kind) for kind in [*KINDS, ""]]
    for each in asked:
        worked.endpoint.wait(each.job.id)
        each.check()
        assert each.job.status == ("COMPLETED" if each.kind else "FAILED")


def rain(worked: Worked, dice: random.Random) -> list[Asked]:
    """Jobs at random moments; one of five is cancelled soon, one of ten has little time."""
    begun, asked = time.monotonic(), []
    todo: list[tuple[float, str]] = sorted((dice.uniform(0, SECONDS), "") for _ in range(JOBS))
    while todo:
        (moment, cancel), *todo = todo
        time.sleep(max(0, begun + moment - time.monotonic()))
        if cancel:
            worked.endpoint.cancel(cancel)
            continue
        policy = {"executionTimeout": dice.randint(1, 500)} if dice.random() < 0.1 else None
        asked.append(ask(worked, dice, dice.choice([*KINDS, ""]), policy))
        if dice.random() < 0.2:
            todo = sorted([*todo, (moment + dice.uniform(0, 1), asked[-1].job.id)])
    return asked


# ---- The server's faults: each is over when its function returns ----


def freeze(worked: Worked) -> None:
    server = worked.state()["pid"]
    os.kill(server, signal.SIGSTOP)
    eventually(lambda: not psutil.pid_exists(server), 30, worked.worker)


def freeze_for_a_moment(worked: Worked) -> None:
    server = worked.state()["pid"]
    os.kill(server, signal.SIGSTOP)
    time.sleep(1)
    os.kill(server, signal.SIGCONT)


def lag(worked: Worked) -> None:
    worked.control("script", **SLOW)
    time.sleep(3)
    worked.control("script", **STEADY)


def kill_runners(worked: Worked) -> None:
    """One after the other, each under the streams of some jobs."""
    for _ in range(5):
        os.kill(worked.state()["runners"][0], signal.SIGKILL)
        time.sleep(0.3)
        eventually(lambda: worked.state().get("loaded"), worker=worked.worker)


def up(worked: Worked) -> bool:
    """Whether the server is loaded and the worker knows it: a death before that is a failed start."""
    log = worked.worker.log
    return bool(worked.state().get("loaded")) and log.count("ready:") == 1 + log.count("started again")


def strike(worked: Worked, dice: random.Random) -> None:
    """Fewer deaths than end the worker: two, and the one of a frozen server."""
    faults = [Worked.kill_server] * 2 + [freeze, freeze_for_a_moment, lag, kill_runners]
    for fault in dice.sample(faults, len(faults)):
        time.sleep(dice.uniform(0.2, 1))
        fault(worked)
        eventually(lambda: up(worked), 30, worked.worker)


# ---- The storm ----


def held(worked: Worked) -> dict[str, int]:
    """What the worker holds, but for connections that it keeps to the platform."""
    process = psutil.Process(worked.worker.pid)
    others = [each.info["environ"] or {} for each in psutil.process_iter(["environ"])]
    ports = [connection.raddr.port for connection in process.net_connections() if connection.raddr]
    return {
        "threads": process.num_threads(),
        "files": process.num_fds() - ports.count(worked.endpoint.port),
        "children": len(process.children(recursive=True)),
        "processes": [each.get("OLLAMA_HOST") for each in others].count(worked.host),
    }


def test_a_storm_of_everything_loses_no_job_no_word_and_no_place() -> None:
    seed = os.environ.get("STORM_SEED") or str(random.randrange(10**6))
    print(f"STORM_SEED={seed}")
    jobs, faults = random.Random(f"{seed} jobs"), random.Random(f"{seed} faults")
    with working(STEADY, REQUEST_TIMEOUT="2") as worked, contextlib.ExitStack() as told:
        told.callback(lambda: print(worked.worker.log))
        endpoint, log = worked.endpoint, lambda: worked.worker.log
        memory = psutil.Process(worked.worker.pid).memory_info
        for _ in range(3):
            one_of_each(worked, jobs)
        eventually(lambda: worked.worker.pod.polls == [8])
        before, bytes_before = held(worked), memory().rss

        endpoint.storm(faults.randrange(10**6), POSTS, stall=7)
        endpoint.storm(faults.randrange(10**6), POLLS, stall=1)
        endpoint.platform.way = 0.1
        with ThreadPoolExecutor(1) as pool:
            struck = pool.submit(strike, worked, faults)
            asked = rain(worked, jobs)
            struck.result()
        endpoint.calm()

        for each in asked:
            endpoint.wait(each.job.id, 40)
            each.check()
        one_of_each(worked, jobs)
        assert log().count("Ollama ended with -9") == 3 and log().count("hangs and is killed") == 1
        assert "status=stopped" in log() and "defect" not in log() and "Traceback" not in log()
        eventually(lambda: worked.worker.pod.polls == [8], worker=worked.worker)
        assert not {seen["state"] for seen in worked.generations()} & {"running", "queued"}
        eventually(lambda: held(worked) == before, worker=worked.worker)
        assert memory().rss < bytes_before + 10_000_000
        worked.worker.terminate()
        assert worked.ends() == 0
