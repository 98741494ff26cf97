"""What the worker costs: the worker in the SDK's real loop against Ollama asked directly, in one run.

    python tests/bench.py [--json FILE] [--plot FILE.png]        on the tests' own Ollama: 6 minutes
    OLLAMA_TEST_HOST=host:port [OLLAMA_TEST_MODEL=name] python tests/bench.py       on a real server

A figure is a median, but for memory, a sum and the worst; what is compared is measured in turns. The
tests' own Ollama says 100 tokens a second, the first after 50 ms, where no row names the real model. A
real server has its own pace; the cold start, which needs a fresh one, is then left out. Time counts
from the request to the caller's side of tests/endpoint.py, where a POST of the worker takes a set time.

Another table has the real model, as Ollama starts it and as the image does: what is kept of a call for
its next turn, while other calls have theirs. A real server is measured as it is.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import requests
from conftest import eventually, free_port, serving
from endpoint import HANDLER, Endpoint, Worker
from test_start import NETWORK, path_with
from test_turns import as_in_the_image

TIMES = 5  # samples of a figure
PHASES = 20  # samples of a first token, spread evenly over the SDK's poll
POLL = 0.1  # s: how often an idle SDK looks at the jobs that it has taken
ROUND_TRIP = 0.05  # s that a POST takes, where it is not varied
# Cold starts: s that loading the model takes, s that nvidia-smi takes (0: no GPU), s to the first token.
COLD = ((0.3, 0, 0.9), (3, 0, 3.4), (3, 0.3, 3.4))
CALLS, TURNS = 8, 5
LINES, LINE_TURNS, EVERY, PAUSES = 6, 4, 3, (4, 8)  # the phone line: s between calls, s between turns
MODEL = "llama3:latest"
SCRIPT = {"models": [MODEL], "repeat": -1, "first_ms": 50, "interval_ms": 10}
STORY = [{"role": "user", "content": "Tell me a very long story about a whale."}]
QUESTION = "My order, number {}, has not come yet: where is it now, who brings it, and on which day?"
Messages = list[dict[str, str]]

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

# nvidia-smi, and the SDK's own test of the GPU's memory.
GPU = """
/bin/sleep {}
echo "NVIDIA-SMI 550.54 CUDA Version: 12.4"
echo "Found 1 GPUs:"
echo "GPU 0: memory allocation test passed."
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
    sides: tuple[str, str] = ("direct", "worker")

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

    def text(self) -> str:
        frames = re.findall(r"^data: (\{.*)", "".join(text for _, text in self.arrivals), re.MULTILINE)
        choices = [choice for frame in frames for choice in json.loads(frame)["choices"]]
        return "".join(choice["delta"].get("content", "") for choice in choices)

    def first_ms(self) -> float:
        return 1000 * (self.tokens()[0] - self.asked)

    def total(self) -> float:
        return self.arrivals[-1][0] - self.asked


PICTURE: dict[Any, Any] = {}  # for --plot: a reply of each kind, and the first tokens by turn


@dataclass
class Server:
    """Ollama, asked directly."""

    host: str
    model: str = MODEL

    def body(self, tokens: int, messages: Messages) -> dict[str, Any]:
        fixed = {"temperature": 0, "seed": 1, "stream": True}
        return {"model": self.model, "messages": messages, "max_tokens": tokens, **fixed}

    def ask(self, tokens: int, messages: Messages = STORY) -> Reply:
        asked, connection = time.monotonic(), http.client.HTTPConnection(self.host, timeout=60)
        headers = {"Content-Type": "application/json", "Connection": "close"}
        body = json.dumps(self.body(tokens, messages))
        connection.request("POST", "/v1/chat/completions", body, headers)
        return Reply(asked, [(time.monotonic(), line.decode()) for line in connection.getresponse()])

    def computed(self) -> float:
        """Prompt tokens that were in no cache, as the tests' own Ollama counts them."""
        seen = requests.get(f"http://{self.host}/test/requests", timeout=5).json()
        return sum(request["computed"] for request in seen)


@dataclass
class Deployment:
    """Ollama, asked through a worker at an endpoint of its own."""

    server: Server
    endpoint: Endpoint
    worker: Worker
    idle_since: float = 0

    def submit(self, tokens: int, messages: Messages = STORY) -> str:
        body = self.server.body(tokens, messages)
        job_input = {"openai_route": "/v1/chat/completions", "openai_input": body}
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

    def heard(self, interrupts: bool, messages: Messages) -> Reply:
        """An answer of 20 tokens, or what of it a caller hears who interrupts."""
        job_id = self.submit(20, messages)
        if not interrupts:
            return self.reply(job_id)
        reply = Reply(self.endpoint.jobs[job_id].submitted, self.endpoint.jobs[job_id].chunks)
        eventually(reply.tokens, 100)
        self.endpoint.cancel(job_id)
        return reply

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
    for callers, times in ((1, 3), (4, 3), (8, TIMES)):
        seen: dict[Any, list[float]] = defaultdict(list)
        for side in (worker.server, worker) * times:
            cpu, start = worker.cpu_ms(), time.monotonic()
            replies = at_once(callers, side, 150, callers)
            cpu = worker.cpu_ms() - cpu - idle * (time.monotonic() - start)
            came = [when for reply in replies for when in reply.tokens()]
            later = [when - min(came) for when in came if when > min(came)]
            seen["rate", side is worker].append(len(later) / max(later))
            seen["first", side is worker].append(max(reply.first_ms() for reply in replies))
            seen["cpu", side is worker].append(1000 * cpu / len(came))
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
    for load, nvidia_smi, bound in COLD:
        script = json.dumps({**SCRIPT, "load_ms": 1000 * load, "gpu_share": 1})
        how = f"Cold start, {load} s of load" + f", {nvidia_smi} s of nvidia-smi" * bool(nvidia_smi)
        pairs = []
        for _ in range(TIMES):
            alone = {} if nvidia_smi else {**cold_server(script), **cold_sdk()}
            pairs.append((alone, cold_worker(script, nvidia_smi)))
        for part in ["first token"] if nvidia_smi else pairs[0][1]:
            direct = [alone[part] for alone, _ in pairs if part in alone]
            row = Row(f"{how}: {part}", "s", direct, [started[part] for _, started in pairs])
            if part == "first token":
                row.target, row.bound = "≤ limit", bound
            yield row


def cold_sdk() -> dict[str, float]:
    start = time.monotonic()
    code = "import cpuinfo; cpuinfo.get_cpu_info = dict; import runpod"  # as the worker imports it
    subprocess.run([sys.executable, "-c", code], check=True)
    return {"SDK imported": time.monotonic() - start}


def cold_server(script: str) -> dict[str, float]:
    server, start = Server(f"127.0.0.1:{free_port()}"), time.monotonic()
    with serving(server.host, OLLAMA_SCRIPT=script) as ollama:
        parts = {"server listens": time.monotonic() - start}
        load_only = {"model": MODEL, "keep_alive": -1}
        requests.post(f"{ollama.url}/api/generate", json=load_only, timeout=60).raise_for_status()
        parts["loaded"] = time.monotonic() - start
        return {**parts, "first token": server.ask(3).tokens()[0] - start}


def cold_worker(script: str, nvidia_smi: float) -> dict[str, float]:
    """A job is waiting for it; the SDK makes all its checks."""
    server = Server(f"127.0.0.1:{free_port()}")
    with Endpoint() as endpoint, tempfile.TemporaryDirectory() as folder:
        Path(folder, "sitecustomize.py").write_text(NETWORK.format(port=endpoint.port))
        programs = ("nvidia-smi", "gpu_test") if nvidia_smi else ()
        path = path_with(Path(folder), dict.fromkeys(programs, GPU.format(nvidia_smi)))
        env = {
            **{"OLLAMA_HOST": server.host, "MODELS": MODEL, "OLLAMA_SCRIPT": script},
            **{"PATH": path, "PYTHONPATH": folder},
            **{"RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "", "RUNPOD_SKIP_GPU_CHECK": ""},
            **{"RUNPOD_BINARY_GPU_TEST_PATH": f"{folder}/gpu_test", "RUNPOD_MIN_DISK_PERCENT": "0.1"},
        }
        start, clock = time.monotonic(), time.time()
        with endpoint.worker(env) as worker:
            deployment = Deployment(server, endpoint, worker)
            job = endpoint.jobs[deployment.submit(3)]
            eventually(lambda: "Starting Serverless" in worker.log)  # the SDK is imported, and says so
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


def assistant(of: str, orders: int) -> Messages:
    """A call before its first turn: 20 tokens for each order that the assistant knows."""
    known = [f"Order {n} is on its way: our driver brings it on day {n % 28}." for n in range(orders)]
    return [{"role": "system", "content": f"You answer the phone of {of}. {' '.join(known)}"}]


def turn(messages: Messages, call: int, reply_to: Callable[[Messages], Reply]) -> float:
    """ms to the first token of the call's next turn."""
    question = QUESTION.format(1000 * call + len(messages))
    messages.append({"role": "user", "content": question})
    reply = reply_to(messages)
    messages.append({"role": "assistant", "content": reply.text()})
    return reply.first_ms()


def kept(what: str, unit: str, columns: list[list[float]], servers: dict[str, Server]) -> Row:
    """A row of the second table; the figures of a real server stand in its last column."""
    (direct, worker), (left, right) = [[], *columns][-2:], ["", *servers][-2:]
    return Row(what, unit, direct, worker, sides=(left, right))


def by_turn(servers: dict[str, Server]) -> Iterator[Row]:
    """Calls of one assistant, asked directly, their turns one after the other in a random order."""
    calls = {name: [assistant("a shop", 25) for _ in range(CALLS)] for name in servers}
    first: dict[str, list[list[float]]] = {name: [[] for _ in range(TURNS)] for name in servers}
    for call in random.Random(1).sample([*range(CALLS)] * TURNS, CALLS * TURNS):
        for name, server in servers.items():
            messages = calls[name][call]
            ms = turn(messages, call, partial(server.ask, 10))
            first[name][len(messages) // 2 - 1].append(ms)
    PICTURE["turns"] = first
    second, last = ([side[number] for side in first.values()] for number in (1, -1))
    what = f"{CALLS} calls in turn: first token of turn"
    yield kept(f"{what} 2", "ms", second, servers)
    row = kept(f"{what} {TURNS}", "ms", last, servers)
    row.target, row.bound = "≤ 1.25 × turn 2", 1.25 * median(second[-1])
    yield row


def phone_line(servers: dict[str, Server]) -> Iterator[Row]:
    """Through the worker: calls that overlap, and callers who interrupt one answer in five."""
    later = []
    for server in servers.values():
        with deployed(server) as worker, ThreadPoolExecutor(LINES) as pool:
            calls = list(pool.map(partial(phone_call, worker), range(LINES)))
        later.append([ms for firsts in calls for ms in firsts[1:]])
    what = "Phone line: first token after a call's first turn"
    yield kept(what, "ms", later, servers)
    row = kept(f"{what}, worst", "ms", [[max(side)] for side in later], servers)
    row.target, row.bound = "≤ 3 × median", 3 * median(later[-1])
    yield row


def phone_call(worker: Deployment, number: int) -> list[float]:
    """ms to the first token of each turn."""
    dice, messages, firsts = random.Random(number), assistant("a bakery", 14), []
    for pause in (EVERY * number, *(dice.uniform(*PAUSES) for _ in range(LINE_TURNS - 1))):
        time.sleep(pause)
        firsts.append(turn(messages, number, partial(worker.heard, dice.random() < 0.2)))
    return firsts


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


@contextlib.contextmanager
def with_real_model(**environment: str) -> Iterator[Server]:
    environment["OLLAMA_NUM_PARALLEL"] = "8"
    with tempfile.TemporaryDirectory() as store, serving(OLLAMA_MODELS=store, **environment) as ollama:
        requests.post(f"{ollama.url}/api/pull", json={"model": MODEL}, timeout=60).raise_for_status()
        server = Server(ollama.host)
        server.ask(2)  # which loads it
        requests.post(f"{ollama.url}/test/clear", timeout=5).raise_for_status()
        yield server


def figures(real_host: str | None) -> Iterator[Row]:
    if real_host:
        models = requests.get(f"http://{real_host}/api/tags", timeout=5).json()["models"]
        model = os.environ.get("OLLAMA_TEST_MODEL") or models[0]["name"]
        server = Server(real_host, model)
        yield from warm(server)
        yield from by_turn({"as it is": server})
        return (yield from phone_line({"as it is": server}))
    with serving(OLLAMA_SCRIPT=json.dumps(SCRIPT), OLLAMA_NUM_PARALLEL="8") as ollama:
        yield from warm(Server(ollama.host))
    yield from cold_starts()
    with with_real_model() as server, deployed(server) as worker:
        yield from latency(worker, (ROUND_TRIP,), ", real model")
    with (
        tempfile.TemporaryDirectory() as folder,
        with_real_model() as plain,
        with_real_model(**as_in_the_image(Path(folder))) as image,
    ):
        servers = {"as Ollama comes": plain, "as this image has it": image}
        yield from by_turn(servers)
        tokens = [[server.computed()] for server in servers.values()]
        yield kept("Their prompt tokens that were computed, sum", "tokens", tokens, servers)
        yield from phone_line(servers)


def draw(file: Path) -> None:
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for side, how, color in (
        ("direct", "Ollama asked directly", "gray"),
        (ROUND_TRIP, "through this worker", "green"),
        ("naive", "through a worker of one POST per token", "crimson"),
    ):
        times = [when - PICTURE[side].asked for when in PICTURE[side].tokens()]
        left.step(times, range(1, 1 + len(times)), color=color, linewidth=2, where="post", label=how)
    left.set(xlabel="seconds since the request", ylabel="tokens at the caller", xlim=0, ylim=0)
    left.set_title("A reply of 100 tokens, where a POST takes 50 ms")
    left.legend(loc="lower right")
    for (how, turns), color in zip(PICTURE["turns"].items(), ("crimson", "green"), strict=False):
        seconds = [median(turn) / 1000 for turn in turns]
        right.plot(range(1, 1 + TURNS), seconds, color=color, linewidth=2, marker="o", label=how)
    right.set(xlabel="turn of a call", ylabel="seconds to the first token", xticks=range(1, 1 + TURNS))
    right.set_ylim(0)
    right.set_title(f"{CALLS} calls of one assistant, their turns in random order")
    right.legend(loc="upper left")
    figure.savefig(file, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path, metavar="FILE", help="every sample, for machines")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="a picture of both tables")
    args = parser.parse_args()
    host, rows, sides = os.environ.get("OLLAMA_TEST_HOST"), [], ("", "")
    for row in figures(host):
        if row.sides != sides:
            sides = row.sides
            print(
                f"\n| what | {' | '.join(sides)} | ratio | target | reached |\n|---|---|---|---|---|---|"
            )
        rows.append({**asdict(row), "reached": row.reached()})
        print(row, flush=True)
    if args.json:
        args.json.write_text(json.dumps({"server": host or "the tests' own", "rows": rows}, indent=1))
    if args.plot:
        draw(args.plot)


if __name__ == "__main__":
    main()
