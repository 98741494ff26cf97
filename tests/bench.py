"""What the worker costs: the worker in the SDK's real loop against Ollama asked directly, in one run.

    python tests/bench.py [--json FILE] [--plot FILE.png]        on the tests' own Ollama: 4 minutes
    OLLAMA_TEST_HOST=host:port [OLLAMA_TEST_MODEL=name] python tests/bench.py       on a real server

Every figure but memory is a median, and what is compared is measured in turns. The tests' own Ollama
says 100 tokens a second, the first after 50 ms, where no row names the real model. A real server has
its own pace; the cold start, which needs a fresh one, is then left out. Time counts from the request
to the caller's side of tests/endpoint.py, where each POST of the worker takes a set time.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import requests
from conftest import eventually, free_port, serving
from endpoint import HANDLER, Endpoint, Worker

TIMES = 5  # samples of a figure
PHASES = 20  # samples of a first token, spread evenly over the SDK's poll
POLL = 0.1  # s: how often an idle SDK looks at the jobs that it has taken
ROUND_TRIP = 0.05  # s that a POST takes, where it is not varied
LOADS = (0.3, 3)  # s that loading the model takes in a cold start
MODEL = "llama3:latest"
SCRIPT = {"models": [MODEL], "repeat": -1, "first_ms": 50, "interval_ms": 10}

EMPTY = """
import runpod
async def handler(job):
    yield "data: [DONE]\\n\\n"
runpod.serverless.start({"handler": handler, "concurrency_modifier": lambda _: 8})
"""
# As many workers do it: each line of Ollama's stream is a yield, and each yield is a POST.
POST_PER_TOKEN = """
import os, aiohttp, runpod
async def handler(job):
    url = f"http://{os.environ['OLLAMA_HOST']}{job['input']['openai_route']}"
    body = job["input"]["openai_input"]
    async with aiohttp.ClientSession() as http, http.post(url, json=body) as response:
        async for line in response.content:
            if line.strip():
                yield line.decode() + "\\n"
runpod.serverless.start({"handler": handler, "concurrency_modifier": lambda _: 8})
"""


@dataclass
class Row:
    """A figure: the samples of both sides, and the bound of the worker's median."""

    what: str
    unit: str
    direct: list[float]
    worker: list[float]
    target: str = ""
    bound: float = 0

    def reached(self) -> str:
        if not self.target:
            return ""
        above = median(self.worker) - self.bound
        return "yes" if above == 0 or (above > 0) == self.target.startswith("≥") else "**NO**"

    def __str__(self) -> str:
        ratio = f"{median(self.worker) / median(self.direct):.2f}" if self.direct else ""
        target = f"{self.target}: {self.shown(self.bound)}" if self.target else ""
        sides = [self.shown(median(side)) if side else "" for side in (self.direct, self.worker)]
        return f"| {' | '.join([self.what, *sides, ratio, target, self.reached()])} |"

    def shown(self, value: float) -> str:
        return f"{value:.2f} s" if self.unit == "s" else f"{value:.0f} {self.unit}"


@dataclass
class Reply:
    """What one caller heard, and when; times are time.monotonic() seconds."""

    asked: float
    arrivals: list[tuple[float, str]]

    def tokens(self) -> list[float]:
        """When each token came."""
        said = re.compile(r'"content":"[^"]')  # some, as Ollama writes it
        return [when for when, text in self.arrivals for _ in said.findall(text)]

    def first_ms(self) -> float:
        return 1000 * (self.tokens()[0] - self.asked)

    def total(self) -> float:
        return self.arrivals[-1][0] - self.asked


PICTURE: dict[Any, Reply] = {}  # a reply of each kind, for --plot


@dataclass
class Server:
    """Ollama, asked directly."""

    host: str
    model: str = MODEL

    def body(self, tokens: int) -> dict[str, Any]:
        messages = [{"role": "user", "content": "Tell me a very long story about a whale."}]
        fixed = {"temperature": 0, "seed": 1, "stream": True}
        return {"model": self.model, "messages": messages, "max_tokens": tokens, **fixed}

    def ask(self, tokens: int) -> Reply:
        asked, connection = time.monotonic(), http.client.HTTPConnection(self.host, timeout=60)
        headers = {"Content-Type": "application/json", "Connection": "close"}
        connection.request("POST", "/v1/chat/completions", json.dumps(self.body(tokens)), headers)
        return Reply(asked, [(time.monotonic(), line.decode()) for line in connection.getresponse()])


@dataclass
class Deployment:
    """Ollama, asked through a worker at an endpoint of its own."""

    server: Server
    endpoint: Endpoint
    worker: Worker
    idle_since: float = 0

    def submit(self, tokens: int) -> str:
        job_input = {"openai_route": "/v1/chat/completions", "openai_input": self.server.body(tokens)}
        return self.endpoint.offer([{"id": str(uuid.uuid4()), "input": job_input}])[0]

    def reply(self, job_id: str) -> Reply:
        job = self.endpoint.wait(job_id, 300)
        assert job.status == "COMPLETED" and job.done, job.error
        self.idle_since = job.done + self.endpoint.platform.round_trip / 2
        return Reply(job.submitted, job.chunks)

    def ask(self, tokens: int, phase: float | None = None) -> Reply:
        """`phase`: s after a poll; an idle SDK counts its polls from the end of its last job."""
        if phase is not None:
            time.sleep((self.idle_since + phase - time.monotonic()) % POLL)
        return self.reply(self.submit(tokens))

    def process(self) -> psutil.Process:
        return psutil.Process(self.worker.pid)

    def cpu_ms(self) -> float:
        return 1000 * sum(self.process().cpu_times()[:2])  # user, system


@contextlib.contextmanager
def deployed(server: Server, script: str = "", **environment: str) -> Iterator[Deployment]:
    """A warm worker; `script` is the text of another one."""
    fixed = {"OLLAMA_HOST": server.host, "MODELS": server.model, "REQUEST_TIMEOUT": "300"}
    env = {**fixed, "RUNPOD_LOG_LEVEL": "INFO", **environment}
    path, args = ("-c", [script]) if script else (HANDLER, [])
    with Endpoint(ROUND_TRIP) as endpoint, endpoint.worker(env, args, path) as worker:
        worker.wait_ready()
        deployment = Deployment(server, endpoint, worker)
        deployment.ask(2)
        yield deployment


def at_once(callers: int, side: Server | Deployment, tokens: int, replies: int) -> list[Reply]:
    with ThreadPoolExecutor(callers) as pool:
        return list(pool.map(side.ask, [tokens] * replies))


def latency(worker: Deployment, trips: tuple[float, ...], how: str = "") -> Iterator[Row]:
    """First tokens, and totals of 100. The floor is an empty handler's frame: the SDK's poll, a POST."""
    seen: dict[Any, list[float]] = defaultdict(list)

    def note(side: str | float, reply: Reply) -> None:
        seen["first", side].append(reply.first_ms())
        if len(reply.tokens()) > 3:
            seen["total", side].append(reply.total())
            PICTURE.setdefault(side, reply)

    with deployed(worker.server, EMPTY) as empty:
        for turn in range(PHASES):
            phase = (7 * turn % PHASES + 0.5) / PHASES * POLL
            tokens = 3 if turn % (PHASES // TIMES) else 100
            note("direct", worker.server.ask(tokens))
            for trip in trips:
                empty.endpoint.platform.round_trip = worker.endpoint.platform.round_trip = trip
                seen["floor", trip].append(1000 * empty.ask(1, phase).total())
                note(trip, worker.ask(tokens, phase))
    for trip in trips:
        at = f"{1000 * trip:.0f} ms a POST{how}"
        yield Row(f"The SDK's floor, {at}", "ms", [], seen["floor", trip])
        row = Row(f"First token, {at}", "ms", seen["first", "direct"], seen["first", trip])
        row.target = "≤ direct + floor + 20 ms"
        row.bound = median(row.direct) + median(seen["floor", trip]) + 20
        yield row
        row = Row(f"100 tokens, {at}", "s", seen["total", "direct"], seen["total", trip])
        if trip == ROUND_TRIP:
            row.target, row.bound = "≤ 1.25 × direct + 50 ms", 1.25 * median(row.direct) + trip
        yield row


def streams(worker: Deployment) -> Iterator[Row]:
    """Callers at once: the tokens of all a second, after the first POST with tokens until the last."""
    worker.endpoint.platform.round_trip = ROUND_TRIP
    cpu = worker.cpu_ms()
    time.sleep(2)
    idle = (worker.cpu_ms() - cpu) / 2
    for callers in (1, 4, 8):
        seen: dict[Any, list[float]] = defaultdict(list)
        for side in (worker.server, worker) * TIMES:
            cpu, start = worker.cpu_ms(), time.monotonic()
            replies = at_once(callers, side, 150, callers)
            cpu = worker.cpu_ms() - cpu - idle * (time.monotonic() - start)
            times = [when for reply in replies for when in reply.tokens()]
            later = [when - min(times) for when in times if when > min(times)]
            seen["rate", side is worker].append(len(later) / max(later))
            seen["first", side is worker].append(max(reply.first_ms() for reply in replies))
            seen["cpu", side is worker].append(1000 * cpu / len(times))
        row = Row(f"{callers} at once", "tokens/s", seen["rate", False], seen["rate", True])
        if callers == 8:
            row.target, row.bound = "≥ 0.95 × direct", 0.95 * median(row.direct)
        yield row
    yield Row("8 at once, the last one's first token", "ms", seen["first", False], seen["first", True])
    yield Row("8 at once, CPU time of the worker for 1,000 tokens", "ms", [], seen["cpu", True])


def memory(server: Server) -> Iterator[Row]:
    with deployed(server) as worker:
        worker.endpoint.platform.round_trip = 0
        for jobs, more in ((0, 0), (100, 100), (500, 400)):
            at_once(8, worker, 5, more)
            megabytes = worker.process().memory_info().rss / 2**20
            yield Row(f"Memory of the worker after {jobs} jobs", "MB", [], [megabytes], "≤ limit", 100)


def cold_starts() -> Iterator[Row]:
    """Seconds from exec, beside those of the server and of the SDK's import, each started alone."""
    for load in LOADS:
        script = json.dumps({**SCRIPT, "load_ms": 1000 * load})
        pairs = [({**cold_server(script), **cold_sdk()}, cold_worker(script)) for _ in range(TIMES)]
        slower = max(median(alone[part] for alone, _ in pairs) for part in ("SDK imported", "loaded"))
        for part in pairs[0][1]:
            direct = [alone[part] for alone, _ in pairs if part in alone]
            worker = [started[part] for _, started in pairs]
            row = Row(f"Cold start, {load} s of load: {part}", "s", direct, worker)
            if part == "first token":
                row.target, row.bound = "≤ slower of import and loaded + 0.4 s", slower + 0.4
            yield row


def cold_sdk() -> dict[str, float]:
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", "import runpod"], check=True)
    return {"SDK imported": time.monotonic() - start}


def cold_server(script: str) -> dict[str, float]:
    server, start = Server(f"127.0.0.1:{free_port()}"), time.monotonic()
    with serving(server.host, OLLAMA_SCRIPT=script) as ollama:
        parts = {"server listens": time.monotonic() - start}
        load_only = {"model": MODEL, "keep_alive": -1}
        requests.post(f"{ollama.url}/api/generate", json=load_only, timeout=60).raise_for_status()
        parts["loaded"] = time.monotonic() - start
        return {**parts, "first token": server.ask(3).tokens()[0] - start}


def cold_worker(script: str) -> dict[str, float]:
    """A job is waiting for it."""
    server = Server(f"127.0.0.1:{free_port()}")
    env = {"OLLAMA_HOST": server.host, "MODELS": MODEL, "OLLAMA_SCRIPT": script}
    with Endpoint() as endpoint:
        start, clock = time.monotonic(), time.time()
        with endpoint.worker(env) as worker:
            deployment = Deployment(server, endpoint, worker)
            job = endpoint.jobs[deployment.submit(3)]
            eventually(lambda: "fitness check" in worker.log)  # the SDK is imported, and says so
            imported = time.monotonic() - start
            reply, process = deployment.reply(job.id), deployment.process()
            [serve] = [child for child in process.children() if "serve" in child.cmdline()]
            load = requests.get(f"http://{server.host}/test/requests", timeout=5).json()[0]
            return {
                "server's exec": serve.create_time() - process.create_time(),
                "server listens": load["started"] - clock,
                "SDK imported": imported,
                "loaded": load["ended"] - clock,
                "job taken": (job.taken or 0) - start,
                "first token": reply.tokens()[0] - start,
            }


def warm(server: Server) -> Iterator[Row]:
    with deployed(server) as worker:
        yield from latency(worker, (0, ROUND_TRIP, 0.1))
        yield from streams(worker)
    with deployed(server, POST_PER_TOKEN) as naive:
        replies = at_once(TIMES, naive, 100, TIMES)
        PICTURE["naive"] = replies[0]
        seconds = [reply.total() for reply in replies]
        yield Row("100 tokens, 50 ms a POST, one POST per token", "s", [], seconds)
    yield from memory(server)


def figures(real_host: str | None) -> Iterator[Row]:
    if real_host:
        models = requests.get(f"http://{real_host}/api/tags", timeout=5).json()["models"]
        model = os.environ.get("OLLAMA_TEST_MODEL") or models[0]["name"]
        return (yield from warm(Server(real_host, model)))
    with serving(OLLAMA_SCRIPT=json.dumps(SCRIPT), OLLAMA_NUM_PARALLEL="8") as ollama:
        yield from warm(Server(ollama.host))
    yield from cold_starts()
    with tempfile.TemporaryDirectory() as store, serving(OLLAMA_MODELS=store) as ollama:
        requests.post(f"{ollama.url}/api/pull", json={"model": MODEL}, timeout=60).raise_for_status()
        with deployed(Server(ollama.host)) as worker:
            yield from latency(worker, (ROUND_TRIP,), ", real model")


def draw(file: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for side, how, color in (
        ("direct", "Ollama asked directly", "gray"),
        (ROUND_TRIP, "through this worker", "green"),
        ("naive", "through a worker of one POST per token", "crimson"),
    ):
        times = [when - PICTURE[side].asked for when in PICTURE[side].tokens()]
        axes.step(times, range(1, 1 + len(times)), color=color, linewidth=2, where="post", label=how)
    axes.set(xlabel="seconds since the request", ylabel="tokens at the caller", xlim=0, ylim=0)
    axes.set_title("A reply of 100 tokens, where a POST takes 50 ms")
    axes.legend(loc="lower right")
    figure.savefig(file, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path, metavar="FILE", help="every sample, for machines")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="tokens at the caller over time")
    args = parser.parse_args()
    host, rows = os.environ.get("OLLAMA_TEST_HOST"), []
    print("| what | direct | worker | ratio | target | reached |\n|---|---|---|---|---|---|")
    for row in figures(host):
        rows.append({**asdict(row), "reached": row.reached()})
        print(row, flush=True)
    if args.json:
        args.json.write_text(json.dumps({"server": host or "the tests' own", "rows": rows}, indent=1))
    if args.plot:
        draw(args.plot)


if __name__ == "__main__":
    main()
