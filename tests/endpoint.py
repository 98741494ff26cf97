"""A RunPod serverless endpoint on loopback, which drives the real SDK in production mode.

On a laptop, the endpoint and one worker (the rp_handler.py of the folder above) until Ctrl-C:

    python tests/endpoint.py [--port 8000] [--round-trip-ms 0]

In a test:

    with Endpoint(round_trip=0.05) as endpoint, endpoint.worker(env={"MODELS": "m"}) as worker:
        worker.wait_ready()
        answer = endpoint.runsync({"message": "hi"})     # {"id", "status", "output", ...}
        job = endpoint.wait(endpoint.run({"message": "hi"}))
        assert job.status == "COMPLETED" and job.answers == 1

It answers the client API as RunPod's operation reference has it (run, runsync, status, stream,
cancel, purge-queue, health, openai/*) and the worker API as SDK 1.12 calls it (job-take,
job-take-batch, job-stop, job-stream, job-done, ping). On these channels it fails as a bad network
and a failing platform do, where a test asks for it:

        endpoint.faults("job-done", ["reset", 429, None, "stall"])  # the next four calls, in order
        endpoint.storm(seed=7, share={"job-stream": 0.03, "job-take": 0.1})  # at random, until calm()
        assert endpoint.met["job-done", "reset"] == 1

- "reset": the connection is aborted (RST) without an answer.
- "stall": no answer, until the caller gives up or `stall` seconds have passed; then a reset.
- "html": a proxy's page instead of an answer, with 200 for a GET and 502 for a POST.
- A number: an answer with this status.

A call that met a fault has done nothing: no job is taken, no stop told, no post taken over.

What no source says of the real platform, and is decided here:
- openai/*: a job that fails before its first byte gives HTTP 500 with an OpenAI error object (which
  the OpenAI client tries again twice); after that the connection is cut, without `[DONE]`.
- openai/*: a client that hangs up before a stream's end cancels its job; clients hang up right after,
  often before the worker's job-done. Hanging up on runsync cancels nothing.
- A post that is not strict JSON (NaN) is refused with 400, one above its channel's limit with 413;
  its job goes on waiting.
- A worker that dies keeps its jobs IN_PROGRESS; `requeue` does what missed pings would lead to.
- Policies have no minimum, and an expired `ttl` ends a job as TIMED_OUT rather than deleting it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, final
from urllib.parse import urlsplit

import requests
from aiohttp import web

HANDLER = Path(__file__).resolve().parent.parent / "rp_handler.py"
POLICY = {"executionTimeout": 600_000, "ttl": 86_400_000}  # the platform's defaults, ms
RUNSYNC_WAIT_MS = 90_000
STREAM_WAIT_S = 1.0
# The docs: a yield's payload is at most 1 MB, /runsync's 20 MB. The SDK counts a MB as 1,000,000
# bytes (rp_tips), which is also the stricter reading: what passes here passes with 2**20.
POST_LIMIT = {"job-stream": 1_000_000, "job-done": 20_000_000}
ENDS = ["data: [DONE]", "event: response.completed"]
CHANNELS = ["job-take", "job-stop", "job-stream", "job-done", "ping"]  # job-take: its batch as well
FAULTS: list[str | int] = ["reset", "stall", "html", 408, 425, 429, 500, 502, 503]


class Bell:
    """Wakes whoever waits for a change, in the event loop's next turn."""

    def __init__(self) -> None:
        self.waiting: list[asyncio.Future[None]] = []

    def ring(self) -> None:
        for waiter in self.waiting:
            if not waiter.done():
                waiter.set_result(None)

    async def until(self, condition: Callable[[], Any], timeout: float = 86_400) -> None:
        """Until the condition holds or `timeout` s have passed; who waits longest wakes first."""
        deadline = time.monotonic() + timeout
        while not condition() and (left := deadline - time.monotonic()) > 0:
            waiter = asyncio.get_running_loop().create_future()
            self.waiting.append(waiter)
            try:
                await asyncio.wait([waiter], timeout=left)
            finally:
                self.waiting.remove(waiter)


@dataclass(eq=False)
class Job:
    """A live record; times are time.monotonic() seconds."""

    id: str
    raw: Any  # what the worker is handed; a dict, unless a test offers something else
    policy: dict[str, Any] = field(default_factory=dict)
    status: str = "IN_QUEUE"
    output: Any = None
    error: Any = None
    chunks: list[tuple[float, Any]] = field(default_factory=list)  # when it got here, output
    # The body of every job-stream and job-done, but for those that met a fault.
    posts: list[bytes] = field(default_factory=list)
    late: list[bytes] = field(default_factory=list)  # those that found the job not in progress
    answers: int = 0  # job-done posts
    worker: str | None = None
    submitted: float = field(default_factory=time.monotonic)
    taken: float | None = None
    done: float | None = None
    ended: threading.Event = field(default_factory=threading.Event)
    bell: Bell = field(default_factory=Bell, repr=False)
    timers: list[asyncio.TimerHandle] = field(default_factory=list, repr=False)
    streamed: int = 0  # chunks that /stream has given out

    @property
    def input(self) -> Any:
        return self.raw.get("input") if isinstance(self.raw, dict) else None

    def beyond(self, chunks: int) -> bool:
        """Whether there is news for a reader who has seen this many chunks."""
        return len(self.chunks) > chunks or self.ended.is_set()

    def answer(self) -> dict[str, Any]:
        """What runsync, status and cancel say of it; times in ms."""
        told = {"workerId": self.worker, "output": self.output, "error": self.error}
        if self.taken:
            told["delayTime"] = round(1000 * (self.taken - self.submitted))
            told["executionTime"] = round(1000 * (self.done - self.taken)) if self.done else None
        known = {name: value for name, value in told.items() if value is not None}
        return {"id": self.id, "status": self.status, **known}


@dataclass(eq=False)
class Pod:
    """A worker as the platform sees it: by its calls alone."""

    polled: threading.Event = field(default_factory=threading.Event)
    polls: list[int] = field(default_factory=list)  # job-takes open now: how many jobs each asks for
    pings: list[dict[str, str]] = field(default_factory=list)
    stops: list[str] = field(default_factory=list)
    bell: Bell = field(default_factory=Bell)
    leaving: bool = False

    @contextlib.contextmanager
    def polling(self, batch_size: int) -> Iterator[None]:
        self.polled.set()
        self.polls.append(batch_size)
        try:
            yield
        finally:
            self.polls.remove(batch_size)


def stormy(dice: random.Random, share: float, stall: float) -> Iterator[tuple[str | int | None, float]]:
    while True:
        yield dice.choice(FAULTS) if dice.random() < share else None, stall


class Platform:
    """The HTTP side; everything here runs in the event loop's thread."""

    def __init__(self, api_key: str | None, round_trip: float, poll: float):
        self.api_key, self.round_trip, self.poll = api_key, round_trip, poll
        self.way = 0.0  # seconds that jobs are on their way to the worker; lost where it hangs up
        self.jobs: dict[str, Job] = {}
        self.queue: deque[Job] = deque()
        self.queued = Bell()
        self.pods: dict[str, Pod] = {}
        self.retried = 0
        self.calls: dict[str, list[float]] = {channel: [] for channel in CHANNELS}
        self.met: Counter[tuple[str, str | int]] = Counter()
        # By channel: the faults that the next calls meet (None: none), each with its stall in s.
        self.faults: dict[str, Iterator[tuple[str | int | None, float]]] = {}
        # Prompts and results are larger than the 1 MB that aiohttp takes by default.
        self.app = web.Application(middlewares=[self.authorize, self.disturb], client_max_size=0)
        routes = [
            ("POST", "run", self.run),
            ("POST", "runsync", self.runsync),
            ("*", "status/{job}", self.status),
            ("*", "stream/{job}", self.stream),
            ("POST", "cancel/{job}", self.cancel),
            ("POST", "purge-queue", self.purge),
            ("GET", "health", self.health),
            ("GET", "openai/{path:.+}", self.openai),
            ("POST", "openai/{path:.+}", self.openai),
            ("GET", "job-take/{pod}", self.job_take),
            ("GET", "job-take-batch/{pod}", self.job_take),
            ("GET", "job-stop/{pod}", self.job_stop),
            ("GET", "ping/{pod}", self.ping),
            ("POST", "job-stream/{pod}/{job}", self.job_post),
            ("POST", "job-done/{pod}/{job}", self.job_post),
        ]
        for method, path, handler in routes:
            self.app.router.add_route(method, f"/v2/local/{path}", handler)

    # ---- the life of a job ----

    def submit(self, raw: Any, policy: dict[str, Any] | None = None) -> Job:
        given = raw.get("id") if isinstance(raw, dict) else None
        job = Job(str(given or uuid.uuid4()), raw, {**POLICY, **(policy or {})})
        self.jobs[job.id] = job
        self.expire(job, "ttl")
        self.queue.append(job)
        self.queued.ring()
        return job

    def expire(self, job: Job, policy: str) -> None:
        seconds = job.policy[policy] / 1000
        loop = asyncio.get_running_loop()
        job.timers.append(loop.call_later(seconds, self.stop, job, "TIMED_OUT"))

    def take(self, pod: str) -> Any:
        job = self.queue.popleft()
        job.status, job.worker, job.taken = "IN_PROGRESS", pod, time.monotonic()
        self.expire(job, "executionTimeout")
        return job.raw

    def stop(self, job: Job, status: str) -> None:
        if job.status == "IN_QUEUE":
            self.queue.remove(job)
        elif job.status == "IN_PROGRESS":
            pod = self.pods[str(job.worker)]
            pod.stops.append(job.id)
            pod.bell.ring()
        self.end(job, status)

    def end(self, job: Job, status: str) -> None:
        if job.ended.is_set():
            return
        job.status, job.done = status, time.monotonic()
        for timer in job.timers:
            timer.cancel()
        job.ended.set()
        job.bell.ring()

    def requeue(self, job: Job) -> None:
        job.timers.pop().cancel()
        job.status, job.worker, job.taken = "IN_QUEUE", None, None
        self.retried += 1
        self.queue.appendleft(job)
        self.queued.ring()

    # ---- what clients call ----

    @web.middleware
    async def authorize(self, request: web.Request, handler: Any) -> web.StreamResponse:
        key = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.api_key and key != self.api_key and "pod" not in request.match_info:
            return web.json_response({"error": "unauthorized"}, status=401)
        return await handler(request)

    def find(self, request: web.Request) -> Job:
        if job := self.jobs.get(request.match_info["job"]):
            return job
        raise web.HTTPNotFound(text="no such job")

    async def accept(self, request: web.Request, job_id: str) -> Job:
        try:
            body = json.loads(await request.read())
            return self.submit({"id": job_id, "input": body["input"]}, body.get("policy"))
        except (ValueError, KeyError, TypeError):
            text = "the body must be a JSON object with an input"
            raise web.HTTPBadRequest(text=text) from None

    async def run(self, request: web.Request) -> web.Response:
        job = await self.accept(request, f"{uuid.uuid4()}-u1")
        return web.json_response({"id": job.id, "status": "IN_QUEUE"})

    async def runsync(self, request: web.Request) -> web.Response:
        job = await self.accept(request, f"sync-{uuid.uuid4()}-u1")
        wait_ms = float(request.query.get("wait", RUNSYNC_WAIT_MS))
        await job.bell.until(job.ended.is_set, wait_ms / 1000)
        return web.json_response(job.answer())

    async def status(self, request: web.Request) -> web.Response:
        return web.json_response(self.find(request).answer())

    async def stream(self, request: web.Request) -> web.Response:
        job = self.find(request)
        await job.bell.until(lambda: job.beyond(job.streamed), STREAM_WAIT_S)
        fresh = [{"output": output} for _, output in job.chunks[job.streamed :]]
        job.streamed += len(fresh)
        return web.json_response({"status": job.status, "stream": fresh})

    async def cancel(self, request: web.Request) -> web.Response:
        job = self.find(request)
        self.stop(job, "CANCELLED")
        return web.json_response(job.answer())

    async def purge(self, request: web.Request) -> web.Response:
        queued = list(self.queue)
        for job in queued:
            self.stop(job, "CANCELLED")
        return web.json_response({"removed": len(queued), "status": "completed"})

    async def health(self, request: web.Request) -> web.Response:
        count = Counter(job.status for job in self.jobs.values())
        busy = {job.worker for job in self.jobs.values() if job.status == "IN_PROGRESS"}
        ready = {name for name, pod in self.pods.items() if pod.polled.is_set() and not pod.leaving}
        jobs = {
            "completed": count["COMPLETED"],
            "failed": count["FAILED"],
            "inProgress": count["IN_PROGRESS"],
            "inQueue": count["IN_QUEUE"],
            "retried": self.retried,
        }
        workers = {"idle": len(ready - busy), "running": len(ready & busy)}
        return web.json_response({"jobs": jobs, "workers": workers})

    async def openai(self, request: web.Request) -> web.StreamResponse:
        job_input: dict[str, Any] = {"openai_route": "/" + request.match_info["path"]}
        body = None
        if request.method == "POST":
            try:
                body = job_input["openai_input"] = json.loads(await request.read())
            except ValueError:
                raise web.HTTPBadRequest(text="the body is not JSON") from None
        job = self.submit({"id": f"{uuid.uuid4()}-u1", "input": job_input})
        streaming = isinstance(body, dict) and body.get("stream")
        try:
            return await (self.openai_sse if streaming else self.openai_json)(request, job)
        except (asyncio.CancelledError, ConnectionError):  # the client hung up
            if not (job.chunks and any(end in str(job.chunks[-1][1]) for end in ENDS)):
                self.stop(job, "CANCELLED")
            raise

    async def openai_json(self, request: web.Request, job: Job) -> web.StreamResponse:
        await job.bell.until(job.ended.is_set)
        if job.status != "COMPLETED":
            return self.openai_failure(job)
        answer = [output for _, output in job.chunks] or job.output
        if isinstance(answer, list) and len(answer) == 1:
            answer = answer[0]
        return web.json_response(answer)

    async def openai_sse(self, request: web.Request, job: Job) -> web.StreamResponse:
        headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
        response = web.StreamResponse(headers=headers)
        sent = 0
        while sent < len(job.chunks) or not job.ended.is_set():
            await job.bell.until(partial(job.beyond, sent))
            for _, chunk in job.chunks[sent:]:
                await response.prepare(request)  # the headers; nothing when they have gone
                text = chunk if isinstance(chunk, str) else json.dumps(chunk)
                await response.write(text.encode())
                sent += 1
        if job.status == "COMPLETED":
            if not sent:  # a handler that returns has an output and no chunks
                output = job.output if isinstance(job.output, list) else [job.output]
                return web.Response(text="".join(map(str, output)), headers=headers)
        elif not sent:
            return self.openai_failure(job)
        elif request.transport:
            request.transport.close()
        return response

    def openai_failure(self, job: Job) -> web.Response:
        message = job.error or f"the job is {job.status}"
        error = {"message": message, "type": "job_failed", "param": None, "code": job.status}
        return web.json_response({"error": error}, status=500)

    # ---- what a worker calls ----

    def pod(self, request: web.Request) -> Pod:
        return self.pods.setdefault(request.match_info["pod"], Pod())

    @web.middleware
    async def disturb(self, request: web.Request, handler: Any) -> web.StreamResponse:
        """Record a worker's call, and let it meet the fault that is due in place of its handler."""
        if "pod" not in request.match_info:
            return await handler(request)
        channel, pod = request.path.split("/")[3].removesuffix("-batch"), self.pod(request)
        self.calls[channel].append(time.monotonic())
        batch_size = int(request.query.get("batch_size", 1))
        with pod.polling(batch_size) if channel == "job-take" else contextlib.nullcontext():
            fault, stall = next(self.faults.get(channel, iter(())), (None, 0))
            if fault is None or pod.leaving:
                return await handler(request)
            self.met[channel, fault] += 1
            await request.read()  # all of a post has been sent when its fault is met
            if fault == "stall":
                await pod.bell.until(lambda: pod.leaving, stall)
            return await self.fail(request, fault)

    async def fail(self, request: web.Request, fault: str | int) -> web.Response:
        if isinstance(fault, int):
            return web.Response(status=fault, text="an injected fault")
        if fault == "html":
            page = "<html><body><h1>The site is down for a moment</h1></body></html>"
            status = 200 if request.method == "GET" else 502
            return web.Response(status=status, text=page, content_type="text/html")
        if request.transport:
            linger = struct.pack("ii", 1, 0)  # closes with RST rather than FIN
            request.transport.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, linger
            )
            request.transport.abort()
        return await asyncio.get_running_loop().create_future()  # the loss of the connection ends it

    async def hold(self, bell: Bell, pod: Pod, ready: Callable[[], Any]) -> None:
        """Hold a poll open until there is an answer; `release` ends those that are held."""
        leaving = pod.leaving
        # Later ones are short, yet not instant: on Python 3.11 a cancel that meets an answer is
        # lost in asyncio.wait_for, and the worker's loop would not end.
        seconds = 0.5 if leaving else self.poll
        await bell.until(lambda: ready() or pod.leaving != leaving, seconds)

    async def job_take(self, request: web.Request) -> web.Response:
        pod, name = self.pod(request), request.match_info["pod"]
        await self.hold(self.queued, pod, lambda: self.queue and not pod.leaving)
        # A poller that has gone must not take a job along.
        gone = pod.leaving or request.transport is None or request.transport.is_closing()
        if gone or not self.queue:
            return web.Response(status=204)
        size = min(int(request.query.get("batch_size", 1)), len(self.queue))
        taken = [self.take(name) for _ in range(size)]
        await asyncio.sleep(self.way)
        return web.json_response(taken if "/job-take-batch/" in request.path else taken[0])

    async def job_stop(self, request: web.Request) -> web.Response:
        pod = self.pod(request)
        await self.hold(pod.bell, pod, lambda: pod.stops)
        stops, pod.stops = pod.stops, []
        if pod.leaving:  # the SDK sleeps 1 s after an empty answer: give it an id that is none
            stops.append("")
        return web.json_response({"jobsToStop": stops}) if stops else web.Response(status=204)

    def release(self, pod: Pod) -> None:
        """Answer the long polls of a worker that is to end, which would sit them out."""
        pod.leaving = True
        pod.bell.ring()
        self.queued.ring()

    async def ping(self, request: web.Request) -> web.Response:
        self.pod(request).pings.append(dict(request.query))
        return web.json_response({})

    async def job_post(self, request: web.Request) -> web.Response:
        channel = request.path.split("/")[3]
        deliver = self.chunk if channel == "job-stream" else self.result
        job, body = self.find(request), await request.read()
        job.posts.append(body)
        if len(body) > POST_LIMIT[channel]:
            raise web.HTTPRequestEntityTooLarge(POST_LIMIT[channel], len(body))
        try:
            posted = json.loads(body, parse_constant=int)  # int("NaN") raises ValueError
        except ValueError:
            raise web.HTTPBadRequest(text="invalid JSON") from None

        def arrive() -> None:
            if job.status != "IN_PROGRESS":
                job.late.append(body)
            deliver(job, posted)

        if self.round_trip:
            asyncio.get_running_loop().call_later(self.round_trip / 2, arrive)
            await asyncio.sleep(self.round_trip)
        else:
            arrive()
        return web.json_response({})

    def chunk(self, job: Job, posted: dict[str, Any]) -> None:
        if job.status == "IN_PROGRESS":
            job.chunks.append((time.monotonic(), posted.get("output")))
            job.bell.ring()

    def result(self, job: Job, posted: dict[str, Any]) -> None:
        progress = posted.get("status") == "IN_PROGRESS"  # runpod.serverless.progress_update
        job.answers += not progress
        if job.status == "IN_PROGRESS":
            job.output, job.error = posted.get("output"), posted.get("error")
            if not progress:
                self.end(job, "FAILED" if job.error else "COMPLETED")


@final
class Endpoint:
    """The platform in a thread of its own, and the calls a test makes; see the file's docstring.

    `round_trip`: seconds that each post of a worker takes; its content reaches the client after
    half of them. `poll`: seconds that job-take and job-stop are held open.
    """

    def __init__(
        self, round_trip: float = 0, api_key: str | None = None, poll: float = 10, port: int = 0
    ):
        self.api_key, self.port = api_key, port
        self.platform = Platform(api_key, round_trip, poll)  # its round_trip can be set later too
        self.workers: list[Worker] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Endpoint:
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()
        except BaseException:
            self._end_loop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result()
        self._end_loop()

    async def _listen(self) -> None:
        # A hang-up is noticed by cancellation; asyncio sets TCP_NODELAY of itself.
        self._runner = web.AppRunner(
            self.platform.app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1
        )
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()
        self.port = self._runner.addresses[0][1]

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def in_loop(self, call: Callable[..., Any], *args: Any) -> Any:
        async def run() -> Any:
            return call(*args)

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v2/local"

    @property
    def openai_url(self) -> str:
        return f"{self.url}/openai/v1"

    @property
    def jobs(self) -> dict[str, Job]:
        return self.platform.jobs

    def call(self, method: str, path: str, body: Any = None, timeout: float = 30) -> Any:
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        with requests.Session() as http:
            http.trust_env = False  # a proxy would not know our loopback
            url = f"{self.url}/{path}"
            response = http.request(method, url, json=body, headers=headers, timeout=timeout)
        response.raise_for_status()
        return response.json()

    def run(self, job_input: Any, policy: dict[str, Any] | None = None) -> str:
        return self.call("POST", "run", {"input": job_input, "policy": policy})["id"]

    def runsync(
        self, job_input: Any, policy: dict[str, Any] | None = None, timeout: float = 30
    ) -> dict[str, Any]:
        """The answer, or the status so far when `timeout` seconds have passed."""
        path = f"runsync?wait={timeout * 1000:.0f}"
        return self.call("POST", path, {"input": job_input, "policy": policy}, timeout + 10)

    def status(self, job_id: str) -> dict[str, Any]:
        return self.call("GET", f"status/{job_id}")

    def cancel(self, job_id: str) -> dict[str, Any]:
        return self.call("POST", f"cancel/{job_id}")

    def health(self) -> dict[str, Any]:
        return self.call("GET", "health")

    def wait(self, job_id: str, timeout: float = 30) -> Job:
        """The job's record once it has ended."""
        job = self.jobs[job_id]
        if not job.ended.wait(timeout):
            logs = "\n".join(worker.log for worker in self.workers)
            raise TimeoutError(f"{job_id} is {job.status} after {timeout} s\n{logs}")
        return job

    def offer(self, raw_jobs: list[Any]) -> list[str]:
        """Queue these, all at once, for the worker to be handed as they are.

        The ids of their records: their own, or one that the worker never sees.
        """
        return self.in_loop(lambda: [self.platform.submit(raw).id for raw in raw_jobs])

    def requeue(self, job_id: str) -> None:
        """Give a job in progress back to the queue, as missed pings would."""
        self.in_loop(self.platform.requeue, self.jobs[job_id])

    def faults(self, channel: str, kinds: Sequence[str | int | None], stall: float = 86_400) -> None:
        """Let the next calls of a channel meet these, one each, in place of what was due before."""
        assert channel in CHANNELS, channel
        assert all(kind is None or isinstance(kind, int) or kind in FAULTS for kind in kinds), kinds
        self.platform.faults[channel] = iter([(kind, stall) for kind in kinds])

    def storm(self, seed: int, share: Mapping[str, float], stall: float = 1.5) -> None:
        """Let each call of these channels meet any fault, with the channel's probability.

        With the same seed, the nth call of a channel meets the same.
        """
        assert set(share) <= set(CHANNELS), share
        for channel, part in share.items():
            self.platform.faults[channel] = stormy(random.Random(f"{seed} {channel}"), part, stall)

    def calm(self) -> None:
        """No more faults; a call that stalls goes on stalling."""
        self.platform.faults.clear()

    @property
    def calls(self) -> dict[str, list[float]]:
        """By channel, the time.monotonic() of every call of a worker, faults or not."""
        return self.platform.calls

    @property
    def met(self) -> Counter[tuple[str, str | int]]:
        """How many calls met a fault, by channel and kind."""
        return self.platform.met

    @contextlib.contextmanager
    def worker(
        self,
        env: dict[str, str] | None = None,
        args: list[str] | None = None,
        script: Path | str = HANDLER,
        terminal: bool = False,
    ) -> Iterator[Worker]:
        """A worker process, ended with the block; `terminal` sends its log there."""
        worker = Worker(self, env or {}, [sys.executable, str(script), *(args or [])], terminal)
        self.workers.append(worker)
        try:
            yield worker
        finally:
            worker.stop()


class Worker:
    """A real worker process in production mode, in a session of its own."""

    def __init__(self, endpoint: Endpoint, env: dict[str, str], command: list[str], terminal: bool):
        self.id = f"worker-{uuid.uuid4().hex[:8]}"
        self.endpoint = endpoint
        self.pod = endpoint.platform.pods.setdefault(self.id, Pod())
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by stop()
        self._text = ""
        self.process = subprocess.Popen(
            command,
            env={**self.environment(), **env},
            stdin=subprocess.DEVNULL,
            stdout=None if terminal else self._log,
            stderr=None if terminal else subprocess.STDOUT,
            start_new_session=True,
        )

    def environment(self) -> dict[str, str]:
        # The SDK appends "&job_in_progress=..." and "&isStream=...": the URLs need a query.
        url, query = self.endpoint.url, "?gpu=NVIDIA+L4"
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("RUNPOD_") and name != "OLLAMA_SCRIPT"
        }
        return {
            **inherited,
            "RUNPOD_WEBHOOK_GET_JOB": f"{url}/job-take/$ID{query}",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{url}/job-done/$RUNPOD_POD_ID/$ID{query}",
            "RUNPOD_WEBHOOK_POST_STREAM": f"{url}/job-stream/$RUNPOD_POD_ID/$ID{query}",
            "RUNPOD_WEBHOOK_PING": f"{url}/ping/$RUNPOD_POD_ID{query}",
            "RUNPOD_AI_API_KEY": "worker-key",
            "RUNPOD_POD_ID": self.id,
            "RUNPOD_ENDPOINT_ID": "local",
            "RUNPOD_PING_INTERVAL": "4000",
            "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
            "RUNPOD_SKIP_GPU_CHECK": "true",
            "PYTHONUNBUFFERED": "1",
        }

    def wait_ready(self, timeout: float = 60) -> None:
        """Until its first job-take; else RuntimeError or TimeoutError with its log."""
        deadline = time.monotonic() + timeout
        while not self.pod.polled.wait(0.05):
            if self.process.poll() is not None:
                raise RuntimeError(f"the worker ended with {self.process.returncode}\n{self.log}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"no job-take within {timeout} s\n{self.log}")

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def log(self) -> str:
        """Its stdout and stderr so far."""
        if not self._log.closed:
            size = os.fstat(self._log.fileno()).st_size
            self._text = os.pread(self._log.fileno(), size, 0).decode(errors="replace")
        return self._text

    @property
    def pings(self) -> list[dict[str, str]]:
        """The query of each ping; a failed fitness check sends one with status=unhealthy."""
        return self.pod.pings

    def terminate(self) -> None:
        """SIGTERM and no more: an idle worker sits out its long polls, as it does at RunPod."""
        self.process.terminate()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self, grace: float = 8) -> None:
        """SIGTERM, its long polls answered; SIGKILL after `grace` s; then its process group."""
        if self.process.poll() is None:
            self.process.terminate()
            self.endpoint.in_loop(self.endpoint.platform.release, self.pod)
            try:
                self.process.wait(grace)
            except subprocess.TimeoutExpired:
                self.kill()
        self.pod.leaving = True
        with contextlib.suppress(ProcessLookupError):
            # The SDK's ping process outlives a worker that was killed.
            os.killpg(self.process.pid, signal.SIGKILL)
        _ = self.log  # the last of it, before the file goes
        self._log.close()


# ---- RunPod on a laptop ----


def ollama_answers() -> bool:
    host = os.environ.get("OLLAMA_HOST") or "127.0.0.1"
    url = urlsplit(host if "://" in host else f"http://{host}")
    version = f"{url.scheme}://{url.hostname}:{url.port or 11434}/api/version"
    with requests.Session() as http, contextlib.suppress(requests.RequestException):
        http.trust_env = False
        return http.get(version, timeout=2).ok
    return False


def use_test_ollama(model: str) -> None:
    """Put the tests' own `ollama` on PATH and pull the model with it, for which it must serve."""
    folders = [str(Path(__file__).resolve().parent), str(Path(sys.executable).parent)]
    os.environ["PATH"] = os.pathsep.join([*folders, os.environ["PATH"]])
    with subprocess.Popen(["ollama", "serve"]) as server:
        try:
            while not ollama_answers() and server.poll() is None:
                time.sleep(0.05)
            subprocess.run(["ollama", "pull", model], check=True)
        finally:
            server.terminate()


def how_to_use(endpoint: Endpoint, model: str) -> str:
    chat = {"model": model, "messages": [{"role": "user", "content": "Say hello."}]}
    curl = "curl -sN -H 'Content-Type: application/json'"
    python = f"""
from openai import OpenAI
client = OpenAI(base_url="{endpoint.openai_url}", api_key="none")
for chunk in client.chat.completions.create(stream=True, **{json.dumps(chat)}):
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
"""
    return f"""
The endpoint and its worker are ready; Ctrl-C ends both. In another terminal:

{curl} {endpoint.openai_url}/chat/completions -d {shlex.quote(json.dumps({**chat, "stream": True}))}

{shlex.quote(sys.executable)} -c {shlex.quote(python)}

{curl} {endpoint.url}/runsync -d {shlex.quote(json.dumps({"input": {"message": "Say hello."}}))}
"""


def interrupt(*_: object) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # a second one must not break the ending
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(description="A RunPod endpoint and one worker, on loopback.")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--round-trip-ms", type=float, default=0, help="of a worker's post")
    args = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    model = [*os.environ.get("MODELS", "").split(), "llama3:latest"][0]
    try:
        if not shutil.which("ollama") and not ollama_answers():
            use_test_ollama(model)
        endpoint = Endpoint(args.round_trip_ms / 1000, port=args.port)
        with endpoint, endpoint.worker(terminal=True) as worker:
            worker.wait_ready(timeout=3600)
            print(how_to_use(endpoint, model), flush=True)
            return worker.process.wait()
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
