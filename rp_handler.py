"""Ollama worker for RunPod serverless: a language model of your own, answering jobs and phone calls.

Run it:
    python rp_handler.py                                   # the job in test_input.json
    python rp_handler.py --test_input '{"input": {"message": "Say hello."}}'
    python rp_handler.py --rp_serve_api                    # /runsync on http://localhost:8000
On RunPod the same command takes jobs from the endpoint's queue.

What a job's `input` may be:
    {"type": "chat", "message": "…"}                       # "chat" may be left out
    {"type": "chat", "messages": [{"role": "user", "content": "…"}], "model": "…", "system": "…",
     "options": {…}, "format": "json" | {schema}, "tools": […], "think": false, "stream": false}
    {"type": "vapi_webhook", "webhook_data": {"message": {"type": "tool-calls", …}}}  # VAPI's own body
    {"type": "vapi_webhook", "webhook_data": {"message": "…", "call_id": "…"}}
    {"openai_route": "/v1/chat/completions", "openai_input": {…}}    # RunPod's OpenAI route
The answer is one JSON object, or frames as they come where the job asks for a stream.
Whatever fails is answered {"error": "<one line>", "status": "error"}.

Who runs at the same time:
    the main thread    on RunPod the event loop of Queue: takes jobs, posts what comes of them, hears
                       stops. It owns the list of jobs, blocks nowhere, and alone ends the worker: `end`.
    a thread a job     runs `answer`, the sync core; `bridge` hands its pieces to the loop. It owns its
                       Job, which any thread may `stop`; tools of a VAPI message have threads beside it.
    the keeper         a thread that finds or starts, loads and watches `ollama serve`. It owns Server's
                       state; jobs wait for `up` or `failure`, and clear `up` where they suspect it.
    other threads      each Job's timer, which stops it at its limit, and the reader of Ollama's output.
    other processes    `ollama serve`, its runner for each loaded model, and the SDK's pings.
Each request to Ollama has a connection of its own: to shut its socket ends the generation.
"""

from __future__ import annotations

import asyncio
import atexit
import collections
import contextlib
import functools
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from reprlib import repr as shown  # short enough to stand in an error
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import urlsplit

if TYPE_CHECKING:  # imported where it is used: `ollama serve` starts before anything heavy is
    import requests

# What leaves for the caller: text of a stream (an SSE frame, or a chat's words), or an object.
Piece = str | dict[str, Any]

# ---- Settings: each from the environment, read once; the README lists them ---------------------------

STARTED = time.monotonic()
ON_RUNPOD = "RUNPOD_WEBHOOK_GET_JOB" in os.environ  # set on the platform only: the SDK's own test

if not ON_RUNPOD:
    from dotenv import load_dotenv

    try:
        load_dotenv(Path(__file__).with_name(".env"))  # the real environment wins
    except UnicodeDecodeError:
        raise SystemExit(".env must be a text in UTF-8.") from None


def setting(name: str, default: str, read: Callable[[str], Any] | dict[str, Any], form: str) -> Any:
    """The value of environment variable `name`; one that `read` refuses or has not, or a number that is
    not above zero, or over 2,000,000 (a socket's time-out takes little more), stops the start."""
    text = os.environ.get(name, "").strip() or default
    try:
        value = read[text.lower()] if isinstance(read, dict) else read(text)
        if type(value) in (int, float) and not 0 < value <= 2e6:
            raise ValueError
        return value
    except (ValueError, KeyError):
        raise SystemExit(f"{name} must be {form}, not {text!r}.") from None


def host_and_port(text: str) -> tuple[str, int]:
    """OLLAMA_HOST as Ollama reads it [envconfig/config.go]; 0.0.0.0 is spoken to locally."""
    scheme, _, place = text.strip("\"'").removesuffix("/").rpartition("://")
    if place.count(":") > 1 and "[" not in place:
        place = f"[{place}]"  # an IPv6 address and no port
    url = urlsplit(f"//{place}")
    port = (80 if scheme else 11434) if url.port is None else url.port
    if scheme not in ("", "http") or not port or not re.fullmatch(r"[\w.:\[\]-]*", place, re.A):
        raise ValueError
    return "127.0.0.1" if url.hostname in (None, "0.0.0.0", "::") else url.hostname, port


LEVELS = {"error": "ERROR", "warn": "WARN", "warning": "WARN", "info": "INFO", "debug": "DEBUG"}
# The SDK's default logs every word of a caller, and a name that it does not know ends in a traceback.
os.environ["RUNPOD_LOG_LEVEL"] = setting(
    "RUNPOD_LOG_LEVEL", "INFO", LEVELS, "DEBUG, INFO, WARN or ERROR"
)
OLLAMA = setting("OLLAMA_HOST", "127.0.0.1:11434", host_and_port, "host:port, spoken to over http")
ADDRESS = f"[{OLLAMA[0]}]:{OLLAMA[1]}" if ":" in OLLAMA[0] else f"{OLLAMA[0]}:{OLLAMA[1]}"
MODELS = setting("MODELS", "llama3:latest qwen2.5:7b", str.split, "model names, blanks between them")
MAX_CONCURRENCY = setting("MAX_CONCURRENCY", "8", int, "a whole number from 1 to 2,000,000")
MAX_TOKENS = setting("MAX_TOKENS", "1024", int, "a whole number from 1 to 2,000,000")
REQUEST_TIMEOUT = setting("REQUEST_TIMEOUT", "50", float, "seconds above 0, 2,000,000 at most")
STARTUP_TIMEOUT = setting("STARTUP_TIMEOUT", "300", float, "seconds above 0, 2,000,000 at most")
CONTEXT_LENGTH = setting("OLLAMA_CONTEXT_LENGTH", "4096", int, "a whole number from 1 to 2,000,000")
STREAMING = setting("STREAMING", "true", {"true": True, "false": False}, "true or false")
VAPI_ASSISTANT_ID = os.environ.get("VAPI_ASSISTANT_ID", "")
VAPI_FIRST_MESSAGE = os.environ.get("VAPI_FIRST_MESSAGE", "Hello! How can I help you?")
VAPI_TRANSFER_NUMBER = os.environ.get("VAPI_TRANSFER_NUMBER", "")
RUNPOD_ENDPOINT_ID = os.environ.get("RUNPOD_ENDPOINT_ID", "")  # the platform sets it
SYSTEM_PROMPT = os.environ.get(
    "SYSTEM_PROMPT",
    "You are a helpful assistant on a phone call. Answer briefly, in plain spoken sentences.",
)

# ---- The handler: one job in, one answer out ---------------------------------------------------------


class JobError(Exception):
    """Why a job fails, in words for its caller. `cure` says what could help: a TRIES key, or None."""

    def __init__(self, text: str, cure: str | None = None):
        super().__init__(text)
        self.cure = cure


@dataclass(eq=False)
class Job:
    """One job under way: its limit of time, its connections to Ollama, and what its log line tells.

    `with` bounds it: at the limit and at the end its connections are shut, whatever hangs or trickles.
    """

    event: Any = None
    streams: bool = False  # whether pieces can reach the caller one by one
    seconds: float = REQUEST_TIMEOUT
    limit: str = "REQUEST_TIMEOUT"
    streamed: bool = False  # whether they do
    kind: str = "-"
    model: str = "-"
    tokens: int = 0
    first_token: float | None = None  # of a stream
    started: float = field(default_factory=time.monotonic)
    stopped: bool = False
    sockets: list[socket.socket] = field(default_factory=list)

    @property
    def id(self) -> str:
        return str(self.event.get("id", "-")) if isinstance(self.event, dict) else "-"

    def __enter__(self) -> Job:
        self.timer = threading.Timer(self.seconds, self.stop)
        self.timer.daemon = True
        self.timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.timer.cancel()
        self.stop()

    def left(self) -> float:
        """Seconds until the job's limit; raises JobError at the limit and once the job is stopped."""
        left = self.started + self.seconds - time.monotonic()
        if left <= 0:
            limit = f"{self.limit}={self.seconds:g} s"
            raise JobError(f"Not done within {limit}: ask for less, or raise it.", cure="more time")
        if self.stopped:
            raise JobError("The job was cancelled.")
        return left

    def token(self) -> None:
        self.tokens += 1
        self.first_token = self.first_token or time.monotonic()

    def stop(self) -> None:
        """Ends the job's generation at once, from any thread: Ollama stops when its client is gone."""
        self.stopped = True
        for connection in self.sockets:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def handler(event: dict[str, Any]) -> dict[str, Any]:
    """Answers one RunPod job {"id": str, "input": {…}} with one object that JSON can write.

    Never raises and never streams. A failure is {"error": "<one line>", "status": "error"}.
    """
    *_, last = answer(Job(event))
    return last  # type: ignore[return-value]


def answer(job: Job) -> Iterator[Piece]:
    """The core of every mode: yields a job's pieces; here alone an error becomes the answer."""
    status, text = "error", ""
    with job:
        try:
            yield from dispatch(job)
            status = "stopped" if job.stopped else "success"
        except JobError as error:
            cancelled = job.stopped and error.cure != "more time"
            status, text = "stopped" if cancelled else "error", str(error)
        except RecursionError:
            text = "The input is nested too deeply; send it flatter."
        except Exception as error:
            # A defect. Its text may hold a caller's words, so the log names only its place.
            trace = traceback.walk_tb(error.__traceback__)
            *_, line = (line for frame, line in trace if frame.f_globals is globals())
            where = f"{type(error).__name__} in line {line}"
            log(f"defect: {where}", job)
            text = f"The worker failed on this job ({where}); please report it."
    log_job(job, status)
    if text:
        yield {"error": one_line(text)[:2000], "status": "error"}


def dispatch(job: Job) -> Iterator[Piece]:
    job_input = job.event.get("input") if isinstance(job.event, dict) else None
    if not isinstance(job_input, dict):
        raise JobError('A job needs an "input" object, such as {"input": {"message": "Hello"}}.')
    kinds = {"chat": chat, "vapi_webhook": vapi_webhook, "openai": openai_route}
    kind = "openai" if job_input.get("openai_route") is not None else job_input.get("type", "chat")
    if str(kind) not in kinds:
        raise JobError(f'Unknown type {shown(kind)}; "type" can be "chat" or "vapi_webhook".')
    job.kind = kind
    return kinds[kind](job_input, job)


def one_line(text: str) -> str:
    return " ".join(text.split())


def part(body: dict[str, Any], name: str) -> dict[str, Any]:
    """The object under `name`; an empty one where the caller sent none, or something else."""
    value = body.get(name)
    return value if isinstance(value, dict) else {}


def log(text: str, job: Job | None = None) -> None:
    sys.stderr.write(f"{job.id} | {text}\n" if job else f"{text}\n")  # one write: lines stay whole


def log_job(job: Job, status: str) -> None:
    """One line a job, and nothing of its content: not even a model's name that no model answers to."""
    now = time.monotonic()
    line = f"kind={job.kind} model={job.model} status={status}"
    line += f" seconds={now - job.started:.2f} tokens={job.tokens}"
    if job.first_token:
        line += f" first_token_ms={1000 * (job.first_token - job.started):.0f}"
        line += f" tokens_per_s={job.tokens / (now - job.first_token):.1f}"
    log(line, job)


# ---- Chat jobs ---------------------------------------------------------------------------------------

CHAT_FIELDS = ("options", "format", "tools", "think")  # go to Ollama as they are
# Options for which Ollama loads the model anew, under everybody's calls, where they differ from what
# it was loaded with [server/sched.go, needsReload]. None: whatever a job gives differs.
LOADED_WITH = {"num_ctx": CONTEXT_LENGTH, "num_gpu": -1, "num_thread": 0}
LOADED_WITH |= dict.fromkeys(("num_batch", "main_gpu", "use_mmap"))


def chat(job_input: dict[str, Any], job: Job) -> Iterator[Piece]:
    """Yields {"status", "response", "model", "usage", "timings", "thinking"?, "tool_calls"?}.

    With "stream": true, each token's text, posted as {"response"}, and a last piece without "response".
    Shapes: https://github.com/ollama/ollama/blob/main/docs/api.md
    """
    body = {field: job_input[field] for field in CHAT_FIELDS if job_input.get(field) is not None}
    body["model"] = model_name(job_input.get("model"))
    body["messages"] = chat_messages(job_input)
    body["stream"] = streams(job_input, job)
    body.setdefault("think", False)  # thinking is dead air unless it is asked for
    options = body.setdefault("options", {})
    if not isinstance(options, dict):
        raise JobError('"options" must be an object of Ollama\'s options, such as {"temperature": 0}.')
    for name, ours in LOADED_WITH.items():
        given = options.get(name)
        if isinstance(given, (int, float)) and given != ours:
            sets = "OLLAMA_CONTEXT_LENGTH" if name == "num_ctx" else f"PARAMETER {name} in its Modelfile"
            reload = f'"{name}": {given} would load the model anew under everybody\'s calls'
            raise JobError(f"{reload}: leave it out; {sets} sets it for all.")
    body["options"] = {**options, "num_predict": max_tokens(options.get("num_predict"))}
    return tried(job, "/api/chat", body, chat_pieces)


def chat_messages(job_input: dict[str, Any]) -> list[dict[str, Any]]:
    message, messages, system = (job_input.get(name) for name in ("message", "messages", "system"))
    if messages is None and isinstance(message, str) and message.strip():
        message, messages = None, [{"role": "user", "content": message}]
    turns = mended(messages) if message is None and isinstance(messages, list) else []
    if not turns or not all(type(turn) is dict and type(turn.get("role")) is str for turn in turns):
        forms = '"message", a text, or "messages", a list of turns like {"role": "user", "content": "…"}'
        raise JobError(f"A chat needs {forms} (not both, and not empty).")
    if system is not None and not isinstance(system, str):
        raise JobError('"system" must be a text.')
    if system is None and not any(turn["role"] == "system" for turn in turns):
        system = SYSTEM_PROMPT
    return [{"role": "system", "content": system}, *turns] if system else turns


def mended(turns: Any) -> Any:
    """Turns as Ollama takes them: its templates drop OpenAI's newer name for `system` in silence, and it
    refuses the `content: null` and `arguments: ""` that VAPI sends. What is no turn stays as it is."""
    for turn in turns if isinstance(turns, list) else []:
        with contextlib.suppress(AttributeError, KeyError, TypeError):
            if turn["role"] == "developer":
                turn["role"] = "system"
            if turn.get("content") is None:
                turn["content"] = ""
            for call in turn.get("tool_calls") or []:
                if call["function"]["arguments"] == "":  # {} is right in a chat
                    call["function"]["arguments"] = "{}"
    return turns


def chat_pieces(lines: Iterator[bytes], job: Job) -> Iterator[Piece]:
    """What Ollama's chunks are to a chat's caller; a plain answer is a stream of one chunk."""
    thinking = ""
    calls: list[Any] = []
    for line in lines:
        chunk = parsed(line)
        message = chunk.get("message") or {}
        text = message.get("content") or ""
        thinking += message.get("thinking") or ""
        calls += message.get("tool_calls") or []
        if text and job.streamed:
            yield text
        if chunk.get("done"):
            break
        job.token()
    else:
        raise JobError(BROKEN_OFF, cure="new runner")
    read, written = chunk.get("prompt_eval_count", 0), chunk.get("eval_count", 0)
    times = {"load_s": "load", "prompt_s": "prompt_eval", "generate_s": "eval", "total_s": "total"}
    job.tokens = written
    yield {
        "status": "success",
        **({} if job.streamed else {"response": text}),
        **({"thinking": thinking} if thinking else {}),
        **({"tool_calls": calls} if calls else {}),
        "model": chunk.get("model", ""),
        "usage": {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written},
        "timings": {name: chunk.get(f"{what}_duration", 0) / 1e9 for name, what in times.items()},  # ns
    }


def model_name(name: Any) -> str:
    """The model to use: the first of MODELS where a job names none. No path, URL or cloud model."""
    if name in (None, ""):
        return MODELS[0]
    word = r"[A-Za-z0-9][\w.-]*"
    if not isinstance(name, str) or not re.fullmatch(rf"({word}/){{0,2}}{word}(:{word})?", name, re.A):
        raise JobError(f'"model" must be a model\'s name, such as {MODELS[0]!r}, not {shown(name)}.')
    if name.endswith(("-cloud", ":cloud")):  # Ollama would send the prompt to ollama.com
        raise JobError(f"{shown(name)} is a cloud model; this worker answers with its own models only.")
    return name


def max_tokens(wanted: Any) -> Any:
    """Ollama has no limit of its own, and reads 0 and less as none."""
    return MAX_TOKENS if wanted is None or (isinstance(wanted, (int, float)) and wanted <= 0) else wanted


def streams(body: dict[str, Any], job: Job) -> bool:
    job.streamed = body.get("stream") or False
    if not isinstance(job.streamed, bool):
        raise JobError('"stream" must be true or false.')
    if job.streamed and not job.streams:  # a plain answer where a stream is due is silence on a call
        where = "only on a RunPod endpoint that runs with STREAMING=true"
        raise JobError(f'"stream": true works {where}; leave "stream" out here.')
    return job.streamed


# ---- The OpenAI route, which VAPI's custom-llm calls -------------------------------------------------

# What may pass, beside the models' own GET: the routes, and the fields that Ollama knows in each.
COMMON = (
    "model stream stream_options max_tokens seed stop temperature top_p frequency_penalty "
    "presence_penalty logprobs"
)
ROUTES = {
    "/v1/chat/completions": f"{COMMON} top_logprobs messages response_format tools reasoning "
    "reasoning_effort",
    "/v1/completions": f"{COMMON} prompt suffix",
    "/v1/responses": "model stream max_output_tokens temperature top_p input instructions tools text "
    "reasoning truncation",
    "/v1/embeddings": "model input dimensions encoding_format",
}
TAKES_NO_TOOLS: set[str] = set()  # models that have refused them


def openai_route(job_input: dict[str, Any], job: Job) -> Iterator[Piece]:
    """Answers {"openai_route", "openai_input"} as Ollama's own /v1 does: SSE frames, or one object.

    Shapes: https://github.com/ollama/ollama/blob/main/docs/api/openai-compatibility.mdx
    """
    route, sent = job_input.get("openai_route"), job_input.get("openai_input")
    # Users paste a URL that already ends so, and VAPI's client adds the path again.
    route = str(route).replace("/chat/completions/chat/completions", "/chat/completions", 1)
    if models := re.fullmatch("/v1/models(?:/(.+))?", route):
        model_name(models[1])
        yield from tried(job, route, None, completion)
        return
    if route not in ROUTES:
        raise JobError(f"Unknown route {shown(route)}; there is /v1/models, {', '.join(ROUTES)}.")
    if not isinstance(sent, dict):
        raise JobError(f'"openai_input" must be the JSON object that {route} takes.')
    body = openai_body(route, sent)
    read = completion_frames if streams(body, job) else completion
    try:
        yield from tried(job, route, body, read)
    except JobError as error:
        if not re.fullmatch(r"Ollama \(400\): \S+ does not support tools", str(error)):
            raise
        model = body["model"]
        log(f"warning: {model} takes no tools, so they are dropped; qwen2.5:7b would take them")
        TAKES_NO_TOOLS.add(model)
        yield from tried(job, route, openai_body(route, sent), read)


def openai_body(route: str, sent: dict[str, Any]) -> dict[str, Any]:
    """What of a body goes on: VAPI adds private fields, such as the caller's number; they stop here."""
    fields = ROUTES[route].split()
    body = {field: sent[field] for field in fields if sent.get(field) is not None}
    body["model"] = model_name(body.get("model"))
    for limit in {"max_tokens", "max_output_tokens"} & {*fields}:
        body[limit] = max_tokens(body.get(limit) or sent.get("max_completion_tokens"))  # a newer name
    if sent.get("tool_choice") == "none" or body["model"] in TAKES_NO_TOOLS:
        body.pop("tools", None)  # Ollama ignores the one, and its 400 for the other would end the call
    for turns in {"messages", "input"} & {*body}:
        body[turns] = mended(body[turns])
    # Thinking is dead air on a call, unless it is asked for.
    if route == "/v1/responses" and isinstance(reasoning := body.get("reasoning", {}), dict):
        body["reasoning"] = {"effort": "none", **reasoning}
    elif route == "/v1/chat/completions" and "reasoning" not in body:
        body.setdefault("reasoning_effort", "none")
    return body


def completion(lines: Iterator[bytes], job: Job) -> Iterator[Piece]:
    whole = parsed(next(lines))
    usage = whole.get("usage") or {}
    job.tokens = usage.get("completion_tokens", usage.get("output_tokens", 0))
    yield whole


def completion_frames(frames: Iterator[bytes], job: Job) -> Iterator[Piece]:
    """SSE frames, as Ollama sends them: `data: {…}`, in /v1/responses below a line `event: …`."""
    for frame in frames:
        _, _, data = frame.partition(b"data: ")
        done = data == b"[DONE]"
        chunk = {} if done else parsed(data)
        if chunk.get("model") == "":  # the last frame of a runner that died; no word of it else
            break
        event = str(chunk.get("type"))
        if ".delta" in event or any(not one.get("finish_reason") for one in chunk.get("choices") or []):
            job.token()
        yield frame.decode("utf-8", "replace") + "\n\n"
        if done or event == "response.completed":
            return
    raise JobError(BROKEN_OFF, cure="new runner")


# ---- VAPI's server messages: https://docs.vapi.ai/server-url/events ----------------------------------


def vapi_webhook(job_input: dict[str, Any], job: Job) -> Iterator[Piece]:
    """Yields {"status", "vapi_response", "call_id"} for `webhook_data`: VAPI's own body, or a text.

    `vapi_response` is the object that VAPI wants, or the model's answer to the text.
    """
    data = part(job_input, "webhook_data")
    message = data.get("message")
    if isinstance(message, str):
        response: Any = ask_model(job, message)
    elif isinstance(message, dict):
        response = VAPI_MESSAGES.get(str(message.get("type")), {})  # a type only told, or a new one
        if callable(response):
            response = response(message, job)
    else:
        forms = '{"message": {"type": …}}, or {"message": "a text"}'
        raise JobError(f'"webhook_data" must be VAPI\'s body, {forms}.')
    call_id = part(part(data, "message"), "call").get("id") or data.get("call_id")
    call_id = call_id if isinstance(call_id, str) else ""
    output = {"status": "success", "vapi_response": response, "call_id": call_id}
    # Without what a caller may have sent and JSON cannot write: lone surrogates, NaN.
    text = json.dumps(output, ensure_ascii=False).encode("utf-8", "replace")
    yield json.loads(text, parse_constant=lambda _: None)


def ask_model(job: Job, message: str) -> str:
    """The model's answer to a text; as a tool, what a caller's assistant may ask it in a call."""
    *_, last = chat({"message": message}, job)
    return last["response"]  # type: ignore[index]


# The tools of `tool-calls`: an owner adds a function of their own, which takes the call's arguments
# by name and returns a text. Those of one message run side by side, each in a thread.
TOOLS: dict[str, Callable[..., Any]] = {"ask_model": ask_model}
TOOL_SECONDS = 15  # VAPI waits 20 s for all results


def tool_calls(message: dict[str, Any], job: Job) -> dict[str, Any]:
    """Runs the calls of one message; {"results": […]} in the order of the calls."""
    listed = message.get("toolCallList")
    listed = listed if isinstance(listed, list) else []
    calls = [called(call) for call in listed if isinstance(call, dict)]
    seconds, pool = min(TOOL_SECONDS, job.left()), ThreadPoolExecutor(32)
    running = [pool.submit(tool_result, name, arguments, job) for _, name, arguments in calls]
    wait(running, seconds)
    late = {"error": f"The tool took longer than {seconds:.3g} s."}
    results = [
        {"toolCallId": call_id, "name": name, **(each.result() if each.done() else late)}
        for (call_id, name, _), each in zip(calls, running, strict=True)
    ]
    pool.shutdown(wait=False, cancel_futures=True)  # a model that still speaks ends with the job
    return {"results": results}


def called(call: dict[str, Any]) -> tuple[Any, str, Any]:
    """A call's id, name and arguments; VAPI sends the latter two inside `function` or flat."""
    function = part(call, "function") or call
    name, arguments = function.get("name"), function.get("arguments", function.get("parameters"))
    return call.get("id", ""), name if isinstance(name, str) else "", arguments


def tool_result(name: str, arguments: Any, job: Job) -> dict[str, str]:
    """{"result": text} of one call, or {"error": text}: the model never makes an answer up."""
    if name not in TOOLS:
        return {"error": one_line(f"There is no tool {shown(name)}; there is {', '.join(TOOLS)}.")}
    try:
        if isinstance(arguments, str):  # VAPI sends an object, or JSON text
            with contextlib.suppress(ValueError):
                arguments = json.loads(arguments.strip() or "{}")
        if arguments and not isinstance(arguments, dict):
            raise JobError("its arguments must be a JSON object.")
        tool = functools.partial(ask_model, job) if TOOLS[name] is ask_model else TOOLS[name]
        result = tool(**(arguments or {}))
        return {"result": one_line(result if isinstance(result, str) else json.dumps(result))}
    except BaseException as error:  # SystemExit and CancelledError too: a job's thread must not end
        return {"error": one_line(f"{name} failed: {error}")}


def function_call(message: dict[str, Any], job: Job) -> dict[str, Any]:
    """VAPI's older form of one tool call."""
    (result,) = tool_calls({"toolCallList": [part(message, "functionCall")]}, job)["results"]
    return {key: result[key] for key in ("result", "error") if key in result}


# The words that VAPI's reasons begin with, and those of one word [its openapi.json, 603 reasons].
ENDED_REASON = (
    "(assistant|call|campaign|customer|exceeded|manually|phone|pipeline|scheduled|silence|twilio|vonage"
    r"|worker)[.-][a-z\d.-]+|aborted|cancelled|error|hangup|timeout|voicemail"
)
CALL_ID = r"(?i)[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"


def end_of_call(message: dict[str, Any], job: Job) -> dict[str, Any]:
    """Logs how a call ended: identifiers and a number, nothing that was said."""
    call, reason = str(part(message, "call").get("id")), str(message.get("endedReason"))
    call = call if re.fullmatch(CALL_ID, call) else "-"
    reason = reason if re.fullmatch(ENDED_REASON, reason) else "-"
    seconds: Any = message.get("durationSeconds")  # in captures; VAPI's schema has only the two times
    with contextlib.suppress(KeyError, AttributeError, ValueError, TypeError):
        times = [message[key].replace("Z", "+00:00") for key in ("startedAt", "endedAt")]
        started, ended = map(datetime.fromisoformat, times)
        seconds = (ended - started).total_seconds()
    seconds = seconds if type(seconds) in (int, float) and 0 <= seconds < 1e6 else "-"
    log(f"call={call} ended: {reason} after {seconds} s", job)
    return {}


# A message's type, and its answer or what makes it. VAPI waits 7.5 s for an assistant: of all these
# only the tools ask the model.
VAPI_MESSAGES: dict[str, dict[str, Any] | Callable[[dict[str, Any], Job], dict[str, Any]]] = {
    "assistant-request": {"error": "No assistant is set up for this number."},
    "tool-calls": tool_calls,
    "function-call": function_call,
    "transfer-destination-request": {"error": "There is no number; VAPI_TRANSFER_NUMBER sets one."},
    "handoff-destination-request": {"error": "There is no assistant; VAPI_ASSISTANT_ID sets one."},
    "knowledge-base-request": {"documents": []},
    "call.endpointing.request": {"timeoutSeconds": 0.5},
    "campaign.predial": {"eligible": True},
    "voice-request": {"error": "This worker makes no audio; choose one of VAPI's voices."},
    "end-of-call-report": end_of_call,
}
if RUNPOD_ENDPOINT_ID:  # then an assistant that talks to this very endpoint
    CUSTOM_LLM = {
        "provider": "custom-llm",
        "url": f"https://api.runpod.ai/v2/{RUNPOD_ENDPOINT_ID}/openai/v1",
        "model": MODELS[0],
        "messages": [{"role": "system", "content": SYSTEM_PROMPT}],
    }
    ASSISTANT = {"firstMessage": VAPI_FIRST_MESSAGE, "model": CUSTOM_LLM}
    VAPI_MESSAGES["assistant-request"] = {"assistant": ASSISTANT}
if VAPI_ASSISTANT_ID:
    HANDOFF = {"type": "assistant", "assistantId": VAPI_ASSISTANT_ID}
    VAPI_MESSAGES["assistant-request"] = {"assistantId": VAPI_ASSISTANT_ID}
    VAPI_MESSAGES["handoff-destination-request"] = {"destination": HANDOFF}
if VAPI_TRANSFER_NUMBER:
    TRANSFER = {"type": "number", "number": VAPI_TRANSFER_NUMBER}
    VAPI_MESSAGES["transfer-destination-request"] = {"destination": TRANSFER}

# ---- The Ollama client -------------------------------------------------------------------------------

TRIES = {"new runner": 2, "free place": 3}
BROKEN_OFF = "Ollama's answer broke off before its end; try again."
Reader = Callable[[Iterator[bytes], Job], Iterator[Piece]]  # of the lines, or frames, of an answer


def tried(job: Job, path: str, body: dict[str, Any] | None, read: Reader) -> Iterator[Piece]:
    """What `read` makes of Ollama's answer; asked again where it helps, as long as nothing has left."""
    begun, model = False, body["model"] if body else None
    for tries in itertools.count(1):
        server.ready(job, again=tries > 1)
        try:
            for piece in read(exchange(job, path, body), job):
                begun, job.model = True, model or "-"
                yield piece
            return
        except JobError as error:
            if error.cure == "more time" and not (begun or job.tokens):
                server.suspect(model or MODELS[0])
            if begun or tries >= TRIES.get(error.cure or "", 1):
                raise
            if error.cure == "free place":
                time.sleep(min(0.5 * tries, job.left()))


def ask(job: Job, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """A question to Ollama that is answered with one JSON object."""
    return parsed(next(exchange(job, path, body)))


def exchange(job: Job, path: str, body: dict[str, Any] | None) -> Iterator[bytes]:
    """Ollama's answer 200: lines or frames as they come where `body` asks for a stream, else all of it.

    Any other answer, and a connection that breaks, is a JobError.
    """
    from urllib3.exceptions import HTTPError

    try:
        data = body and json.dumps(body, allow_nan=False).encode()
    except (TypeError, ValueError):
        raise JobError("The input holds what JSON cannot: NaN, infinity, or bytes.") from None
    headers = {"Content-Type": "application/json"}
    limits = (job.left(), None)  # s to connect; from then on the job's own limit shuts the socket
    how: Any = {"headers": headers, "allow_redirects": False, "stream": True, "timeout": limits}
    try:
        with connecting(job) as http:
            url = f"http://{ADDRESS}{path}"
            response = http.request("POST" if body else "GET", url, data=data, **how)
            if response.status_code != 200:
                refuse(response, job)
            if body and body.get("stream"):
                end_of_each = b"\n\n" if path.startswith("/v1") else b"\n"
                yield from filter(None, response.iter_lines(None, delimiter=end_of_each))
            else:
                yield response.content
    except (OSError, HTTPError) as error:  # what requests raises is an OSError
        job.left()  # a stop or the limit breaks the connection too: that is then the reason
        text = f"The connection to Ollama broke ({type(error).__name__}); try again."
        raise JobError(text, cure="new runner") from None


def connecting(job: Job) -> requests.Session:
    """A session whose connections are the job's to shut, also before the first byte has come."""
    import requests  # 0.2 s, while `ollama serve` starts
    from urllib3 import HTTPConnectionPool
    from urllib3.connection import HTTPConnection

    class Connection(HTTPConnection):
        def connect(self) -> None:
            super().connect()
            job.sockets.append(self.sock)
            job.left()  # a stop that came just before found no socket to shut

    class Pool(HTTPConnectionPool):
        ConnectionCls = Connection

    http = requests.Session()
    http.trust_env = False  # no proxy and no .netrc on the way to loopback
    http.get_adapter("http://").poolmanager.pool_classes_by_scheme = {"http": Pool}  # type: ignore[attr-defined]
    return http


def parsed(content: bytes) -> dict[str, Any]:
    """A JSON object of Ollama's. What is none, or says an error, is Ollama's failure."""
    value: Any = None
    with contextlib.suppress(ValueError):
        value = json.loads(content)
    if not isinstance(value, dict):
        raise JobError("Ollama's answer was garbled; try again.", cure="new runner")
    if value.get("error"):
        raise JobError(f"Ollama: {words_of(value)}", cure="new runner")
    return value


def refuse(response: requests.Response, job: Job) -> NoReturn:
    """Raises Ollama's refusal in its own words, with what would help."""
    status, text = response.status_code, response.content.decode("utf-8", "replace")
    with contextlib.suppress(ValueError):
        text = words_of(json.loads(text))
    if status == 404 and "not found" in text:
        models = ask(job, "/api/tags").get("models") or []
        text += f"; installed: {', '.join(model['name'] for model in models) or 'none'}"
    # A runner that died: "model runner has …", or "… encountered while running the model: …"
    cure = "free place" if status == 503 else "new runner" if "runn" in text else None
    raise JobError(f"Ollama ({status}): {text}", cure)


def words_of(body: Any) -> str:
    """The text of Ollama's two error shapes, {"error": str} and {"error": {"message": str}}."""
    error = body.get("error", body) if isinstance(body, dict) else body
    return str(error.get("message", error) if isinstance(error, dict) else error)


# ---- The server's life -------------------------------------------------------------------------------

SERVER_ENVIRONMENT = {  # of a server that the worker starts; what the environment already sets, wins
    "OLLAMA_KEEP_ALIVE": "-1",
    "OLLAMA_NO_CLOUD": "1",  # else a prompt for a ":cloud" model goes to ollama.com
    "OLLAMA_NUM_PARALLEL": str(MAX_CONCURRENCY),  # Ollama's default is 1: the other jobs would queue
    "OLLAMA_CONTEXT_LENGTH": str(CONTEXT_LENGTH),  # tokens for each job; memory grows with both
}
DEATHS, WITHIN = 5, 600  # so many deaths of the server within so many s are its last


class Server:
    """The Ollama server beside the worker: found running, or started, kept alive and ended.

    It is `up`, or has a `failure` for good, or its keeper is about it. On RunPod a worker is not ready
    without its model.
    """

    def __init__(self) -> None:
        self.up = threading.Event()
        self.failure = ""
        self.suspected = ""  # the model of a job that ran into its limit without a byte
        self.stopped = False
        self._process: subprocess.Popen[bytes] | None = None  # of its own
        self._keeper = threading.Thread(target=self._keep, daemon=True)
        self._lock = threading.RLock()  # a signal's handler may stop what its own thread is starting

    def start(self) -> None:
        """Begins to find or start the server, in a thread, once."""
        with self._lock:
            if not self._keeper.ident:
                self._keeper.start()

    def ready(self, job: Job | None = None, again: bool = False) -> None:
        """Waits until the server is up, within the job's time; `again`: after its connection broke.

        Raises JobError once the server has failed.
        """
        self.start()
        while not self.up.wait(0.05) or (again and self._process and not answers()):
            if self.failure:
                raise JobError(self.failure)
            if job:
                job.left()

    def suspect(self, model: str) -> None:
        """A job ran into its limit without a byte: no job is taken until it is known what that was."""
        if self._process and self.up.is_set():
            self.suspected = model
            self.up.clear()

    def stop(self, grace: float = 5) -> None:
        """Ends the server that the worker started: asks it, and after `grace` s ends it by force."""
        with self._lock:
            self.stopped = True
        if process := self._process:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(grace)
            self._sweep(process)

    def _keep(self) -> None:
        """The keeper's thread, which lives as long as a server of its own does."""
        deaths: list[float] = []
        try:
            while process := self._begin():
                self.up.set()
                while process.poll() is None:
                    time.sleep(0.05)
                    if not self.up.is_set():  # a job suspects it
                        self._examine(process, self.suspected)
                self.up.clear()
                self._sweep(process)
                if self.stopped:
                    return
                now, code = time.monotonic(), process.returncode
                deaths = [death for death in deaths if now - death < WITHIN] + [now]
                if len(deaths) >= DEATHS:
                    times = f"{DEATHS} times within {WITHIN} s"
                    raise JobError(f"Ollama ended {times}, the last with {code}.")
                pause = 0.1 * 2 ** len(deaths)
                log(f"warning: Ollama ended with {code}; it is started again in {pause:g} s")
                time.sleep(pause)
            self._process = None
            self.up.set()  # somebody else's
        except Exception as error:  # a defect too: whoever waits for the server must hear of it
            asked_to = self.stopped
            self.stop(grace=0)
            kind = "" if isinstance(error, JobError) else f"{type(error).__name__}: "
            self.failure = f"{kind}{error}"
            if ON_RUNPOD and not asked_to:
                signal.pthread_kill(threading.main_thread().ident or 0, SIGNALS[0])  # `end_by_signal`

    def _examine(self, process: subprocess.Popen[bytes], model: str) -> None:
        """Ends a server that says no version, or whose model says no token: more than being slow.

        The jobs before it may take their whole time where a model has one slot only: hence the 10 s.
        """
        token = {"model": model, "prompt": "Hi", "stream": False, "options": {"num_predict": 1}}
        seconds = REQUEST_TIMEOUT + 10 if model == MODELS[0] else STARTUP_TIMEOUT  # it may be loading
        try:
            with Job(seconds=5) as job:
                ask(job, "/api/version")
            with Job(seconds=seconds) as job:
                ask(job, "/api/generate", token)
        except JobError as error:
            if error.cure == "more time":
                log("warning: Ollama, or a runner of a model, hangs and is killed")
                process.kill()
                process.wait(10)  # TimeoutExpired: it cannot be killed, and the worker has failed
        if process.poll() is None:
            self.up.set()

    def _begin(self) -> subprocess.Popen[bytes] | None:
        """Finds the server, or starts one, and loads the default model; returns its own process."""
        with Job(seconds=STARTUP_TIMEOUT, limit="STARTUP_TIMEOUT") as job:
            process = None
            try:  # not `answers`: the client takes 0.2 s to import
                socket.create_connection(OLLAMA, timeout=1).close()
            except OSError:
                process = self._spawn(job)
            if not (process or answers()):
                no_answer = "GET /api/version was not answered within 2 s"
                raise JobError(f"{ADDRESS} is taken by something that is not Ollama: {no_answer}.")
            try:
                if process or ON_RUNPOD:
                    self._load(job)
            except JobError as error:
                if ON_RUNPOD:
                    raise
                log(f"warning: {error}")  # on a laptop a job may ask for another model
            return process

    def _spawn(self, job: Job) -> subprocess.Popen[bytes]:
        """Starts a server and waits until it answers."""
        none = f"No Ollama server answers at OLLAMA_HOST={ADDRESS}, and"
        if not shutil.which("ollama"):
            raise JobError(f"{none} `ollama` is not on PATH: get it from https://ollama.com/download.")
        if OLLAMA[0] not in ("localhost", "::1") and not OLLAMA[0].startswith("127."):
            raise JobError(f"{none} the worker starts one on loopback only: take 127.0.0.1:11434.")
        given = {name: value for name, value in os.environ.items() if value}  # as Ollama reads them
        with self._lock:
            if self.stopped:
                raise JobError("The worker ends.")
            self._process = process = subprocess.Popen(
                ["ollama", "serve"],
                env={**SERVER_ENVIRONMENT, **given, "OLLAMA_HOST": ADDRESS},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the worker, which lets its jobs finish first
            )
        atexit.register(self.stop)  # for who imports `handler`; the worker ends it in `end`
        # Read, so that it never blocks. One line is kept, and told only of a start that fails: what a
        # server says later may hold a caller's words.
        said: collections.deque[bytes] = collections.deque(maxlen=1)

        def read(output: Any) -> None:
            with output:  # `process` may stay for long: urllib3's errors are cycles that hold our frames
                said.extend(output)

        reader = threading.Thread(target=read, args=(process.stdout,), daemon=True)
        reader.start()
        while not answers():
            if process.poll() is not None:
                self._sweep(process)
                reader.join(5)
                ended = f"`ollama serve` ended with {process.returncode} before it answered"
                raise JobError(one_line(f"{ended}: {b''.join(said).decode('utf-8', 'replace')}"))
            time.sleep(min(0.02, job.left()))
        return process

    def _load(self, job: Job) -> None:
        """Loads the default model; where it fails, or lies on the CPU, RunPod tries another machine."""
        name = MODELS[0] if ":" in MODELS[0] else f"{MODELS[0]}:latest"
        gpus = None  # asked for while the model loads: it can take a second
        if shutil.which("nvidia-smi"):
            gpus = subprocess.Popen(["nvidia-smi", "-L"], stdout=subprocess.PIPE)
        try:
            ask(job, "/api/generate", {"model": name, "keep_alive": -1})
            loaded = {model["name"]: model for model in ask(job, "/api/ps").get("models") or []}
            gpu = gpus and b"GPU" in gpus.communicate(timeout=10)[0]
        except JobError as error:
            raise JobError(f"{name} could not be loaded. {error}") from None
        except subprocess.TimeoutExpired:
            raise JobError("`nvidia-smi -L` hangs: look at the machine's driver.") from None
        size, on_gpu = (loaded.get(name, {}).get(key, 0) for key in ("size", "size_vram"))
        if gpu and size and not on_gpu:  # ten times slower, at a GPU's price
            look = "look at the machine's driver and at the endpoint's allowed CUDA versions"
            raise JobError(f"{name} is computed on the CPU though there is a GPU: {look}.")
        share = f"{100 * on_gpu / max(size, 1):.0f} % of it in GPU memory"
        if gpu and on_gpu < size:
            log(f"warning: {share}; a smaller MAX_CONCURRENCY or OLLAMA_CONTEXT_LENGTH helps")
        log(f"ready: {name} after {time.monotonic() - STARTED:.1f} s, {size / 2**30:.1f} GiB, {share}")

    def _sweep(self, process: subprocess.Popen[bytes]) -> None:
        """Ends what is left of a server: the runners of one that was killed hold the GPU's memory."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):  # no child (any more)
            for _ in range(50):  # they are this worker's to reap where it is the first process
                os.waitpid(-process.pid, os.WNOHANG)
                time.sleep(0.02)


def answers() -> bool:
    """Whether Ollama does, not only its port: that of a dying server can still take a connection."""
    with contextlib.suppress(JobError), Job(seconds=2) as job:
        return "version" in ask(job, "/api/version")
    return False


server = Server()

# ---- The endpoint's queue: where RunPod's SDK is mended -----------------------------------------------
#
# What SDK 1.12 does to a caller                           What is done about it
# - counts a job twice: half of a burst waits 1 s          places are counted by Queue's own tasks
# - calls the handler up to 0.1 s after it has the job     the job begins in the same turn of the loop
# - loses a chunk or a result after one reset or 429       `_deliver` posts it again, in order
# - a cancel before a job's first step keeps its place     a task's done-callback gives it back …
# - a cancel reaches no `finally` of a generator handler   … and stops the job
# - tries a failed job-take again at once, for ever        `polled` pauses, 0.2 to 5 s
# - closes a connection that is idle for 15 s              after 60 s: a caller speaks for longer, and a
#                                                          new one costs the first word 3 round trips
# - a job that its poll brings after SIGTERM never runs    the poll is given up
# Upstream: 1.12.0 is the newest release, and its repository does the same.
#
# All of it lies in the SDK's JobScaler, so `main` puts Queue in its place; start, checks, pings, URLs
# and the requests of both polls stay the SDK's. The names in `Queue.__init__` are private, hence
# runpod<1.13. tests/test_sdk.py runs the SDK's own loop and tells when a line here is no longer true.

CHUNK_BYTES = 512 * 1024  # RunPod's limit for a streamed chunk is 1 MB, and JSON may double quotes
POLL_SECONDS = 90  # a long poll for jobs or stops, as in the SDK
POST_SECONDS, DELIVERY_SECONDS = 5, 30  # one try, and all tries, of one chunk or result


class Queue:
    """Takes the endpoint's jobs, runs each in a task and delivers what comes; all in one event loop."""

    def __init__(self) -> None:
        from runpod import http_client
        from runpod.serverless.modules import rp_http, rp_job, worker_state

        self.headers = http_client.get_auth_header()
        self.get_job, self.get_stop_signals = rp_job.get_job, rp_job.get_stop_signals
        self.done_url, self.stream_url = rp_http.JOB_DONE_URL, rp_http.JOB_STREAM_URL
        self.progress = worker_state.JobsProgress()  # what the SDK's pings tell
        self.tasks: dict[str, asyncio.Task[None]] = {}  # by job id: they hold the worker's places
        self.stopping, self.failed = asyncio.Event(), False

    async def serve(self) -> None:
        """Until a signal, or a server that cannot be kept; then the jobs under way finish."""
        import aiohttp

        for signum in SIGNALS:
            asyncio.get_running_loop().add_signal_handler(signum, self._stop)
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=60)
        limit = aiohttp.ClientTimeout(POLL_SECONDS)
        how = {"connector": connector, "headers": self.headers, "timeout": limit}
        async with aiohttp.ClientSession(**how) as self.session:
            loops = (self._take_jobs(), self._hear_stops(), self.stopping.wait())
            taking, *others = [asyncio.ensure_future(each) for each in loops]
            await asyncio.wait({taking, *others}, return_when=asyncio.FIRST_COMPLETED)
            taking.cancel()  # gives the open poll up: the jobs that are on their way to it are lost
            await asyncio.wait({taking}, timeout=0.1)
            log("stopping: no new job is taken, those under way finish")
            await asyncio.gather(*self.tasks.values(), return_exceptions=True)
            if not self.stopping.is_set():
                end(1, "a loop of the queue has ended")
            end_by_signal()

    def _stop(self) -> None:
        if self.stopping.is_set() and self.failed == bool(server.failure):
            end(1, "a second signal", grace=0)
        self.stopping.set()
        self.failed = bool(server.failure)  # the keeper's own signal, after one, is no second one

    async def _take_jobs(self) -> None:
        async for event in polled(self._take):
            if not isinstance(event, dict) or not isinstance(event.get("id"), str):
                log("warning: a job without an id came, which cannot be answered")
            elif event["id"] not in self.tasks:
                self._begin(event)

    async def _take(self) -> Any:
        """A long poll for as many jobs as there are places."""
        while self.stopping.is_set() or not server.up.is_set() or len(self.tasks) >= MAX_CONCURRENCY:
            await asyncio.sleep(0.02)
        return await self.get_job(self.session, MAX_CONCURRENCY - len(self.tasks))

    def _begin(self, event: dict[str, Any]) -> None:
        job = Job(event, streams=STREAMING)
        self.progress.add(job.id)
        task = self.tasks[job.id] = asyncio.ensure_future(self._run(job))

        def give_place_back(task: asyncio.Task[None]) -> None:  # also before the task's first step
            if not task.cancelled() and task.exception():
                log(f"defect: {type(task.exception()).__name__} while delivering", job)
            job.stop()
            del self.tasks[job.id]
            self.progress.remove(job.id)

        task.add_done_callback(give_place_back)

    async def _hear_stops(self) -> None:
        """Cancels the jobs that were cancelled, or have run into their policy, at the platform."""
        async for job_id in polled(lambda: self.get_stop_signals(self.session)):
            if task := self.tasks.get(job_id):
                task.cancel()

    async def _run(self, job: Job) -> None:
        """Delivers what comes of a job, in order, and its result last."""
        while not (server.up.is_set() or server.failure):  # a poll was open as the server died
            await asyncio.sleep(0.02)
        job.started = time.monotonic()
        pieces: list[Piece] = []
        result: dict[str, Any] = {}
        async for piece in bridge(job):
            if isinstance(piece, dict) and piece.get("error"):
                result = {"error": piece["error"]}
                break
            if job.kind == "chat" and isinstance(piece, str):  # the OpenAI route's frames leave as texts
                piece = {"response": piece}
            pieces.append(piece)
            result = {"output": pieces if STREAMING else piece}
            try:
                if STREAMING:
                    await self._deliver(job, f"{self.stream_url}&isStream=false", {"output": piece})
            except JobError as error:
                if job.streamed:  # a whole object is in the result too
                    log(f"error: a chunk could not be delivered. {error}", job)
                    result = {"error": str(error)}
                    break
        job.stop()
        url = f"{self.done_url}&isStream={str(STREAMING).lower()}"
        try:
            await self._deliver(job, url, result)
        except JobError as error:
            log(f"error: the result could not be delivered. {error}", job)
            if error.cure == "less":  # then at least that
                await self._deliver(job, url, {"error": str(error)})

    async def _deliver(self, job: Job, url: str, content: dict[str, Any]) -> None:
        """Posts a chunk or a result, and again after what may pass; JobError where it is not taken."""
        import aiohttp

        data = json.dumps(content, ensure_ascii=False).encode("utf-8", "replace")
        headers = {"X-Request-ID": job.id, "Content-Type": "application/x-www-form-urlencoded"}
        how: Any = {"headers": headers, "timeout": aiohttp.ClientTimeout(POST_SECONDS + len(data) / 1e6)}
        until, pause = time.monotonic() + DELIVERY_SECONDS, 0.1
        while True:
            try:
                async with self.session.post(url.replace("$ID", job.id), data=data, **how) as response:
                    status: Any = response.status
            except (aiohttp.ClientError, asyncio.TimeoutError) as error:
                status = type(error).__name__
            if status in range(200, 400):
                return
            passes = status not in range(400, 500) or status in (408, 425, 429)
            if not passes or time.monotonic() + pause > until:
                text = f"RunPod did not take what came of the job ({status})."
                raise JobError(text, cure="less" if status == 413 else None)
            await asyncio.sleep(pause)
            pause = min(2 * pause, 5)


async def polled(poll: Callable[[], Awaitable[Any]]) -> AsyncIterator[Any]:
    """What one long poll after the other brings; a growing pause after each that fails."""
    pause = 0.0
    while True:
        asked, brought = time.monotonic(), None
        try:
            brought, pause = await poll(), 0
        except asyncio.TimeoutError:
            pause = 0  # nothing came: the platform holds a poll open for long
        except Exception as error:  # whatever RunPod, or what lies between, answers
            pause = min(2 * pause or 0.2, 5)
            log(f"warning: RunPod could not be asked ({type(error).__name__}); again in {pause:g} s")
        for each in brought or []:
            yield each
        # Not held open but answered at once, and empty: by a proxy, or with FlashBoot.
        at_once = not brought and time.monotonic() - asked < 0.2
        await asyncio.sleep(pause or 0.2 * at_once)


async def bridge(job: Job) -> AsyncIterator[Piece]:
    """The core for an event loop: runs it in a thread, and yields what has come of it meanwhile.

    Texts of a stream that come while the last piece is posted leave together.
    """
    pieces: collections.deque[Piece | None] = collections.deque()
    came, loop = asyncio.Event(), asyncio.get_running_loop()

    def work() -> None:
        for piece in itertools.chain(answer(job), [None]):
            pieces.append(piece)
            loop.call_soon_threadsafe(came.set)

    threading.Thread(target=work, daemon=True).start()
    while await came.wait():
        came.clear()
        while pieces:
            piece, size = pieces.popleft(), 0
            while isinstance(piece, str) and pieces and isinstance(following := pieces[0], str):
                size = (size or len(json.dumps(piece))) + len(json.dumps(following))
                if size > CHUNK_BYTES:
                    break
                piece += pieces.popleft()  # type: ignore[operator]
            if piece is None:
                return
            yield piece


# ---- The worker's life -------------------------------------------------------------------------------

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def end_by_signal(*_: object) -> NoReturn:
    """The end after a signal: the platform's, or that of a server which has failed for good."""
    end(1 if server.failure else 0, server.failure or "stopped by a signal")


def end(code: int, reason: str, grace: float = 5, report: bool = True) -> NoReturn:
    """Every ending passes through here, in the main thread: says why, ends what was started, and itself.

    `code` 0: done, or asked to by a signal; 1: failed, or not let finish. Ollama has `grace` s to end.
    """
    for signum in SIGNALS:
        signal.signal(signum, lambda *_: end(1, "a second signal", grace=0))
    log(f"{'error' if code else 'ended'}: {reason}")
    server.stop(grace)
    if code and ON_RUNPOD and report:  # the platform hears why, as from the SDK's own checks
        with contextlib.suppress(ImportError, AttributeError):
            from runpod.serverless.modules import rp_fitness

            rp_fitness._report_unhealthy("ollama", reason)
    for child in multiprocessing.active_children():  # the SDK's pings
        child.kill()
    os._exit(code)  # not sys.exit: it would wait for threads that may hang


def main() -> None:
    for signum in SIGNALS:  # until the queue's loop has its own
        signal.signal(signum, end_by_signal)
    sys.stdout.reconfigure(line_buffering=True, write_through=False)  # type: ignore[union-attr]  # the SDK's lines, whole
    server.start()  # loads the model while the SDK is imported
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # RunPod hears of a failure through the SDK only
    try:
        import cpuinfo

        get_cpu_info, cpuinfo.get_cpu_info = cpuinfo.get_cpu_info, dict
        import runpod  # 0.4 s, and 1.1 s more where its debugger asks for the CPU's name

        cpuinfo.get_cpu_info = get_cpu_info
        modules = runpod.serverless.modules
        scaler, fitness = modules.rp_scale.JobScaler, modules.rp_fitness
        # A release that lacks one of these says so here; to set it would hide that.
        assert scaler.start and fitness._terminate_unhealthy and fitness._report_unhealthy
        endpoint = Queue()
        scaler.start = lambda _: asyncio.run(endpoint.serve())
        # A check of the SDK's that fails would end the process past Ollama.
        fitness._terminate_unhealthy = lambda code: end(code, "a check of the SDK failed", report=False)
        given, _ = runpod.serverless.parser.parse_known_args()
    except (ImportError, AttributeError) as error:
        end(1, f"This worker needs runpod>=1.12,<1.13. {error}")
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    # Registered from within a first check it runs last: the SDK's own run beside the load, and its pings
    # begin after it. A server that fails is no check's failure but a signal, whatever the SDK waits for.
    register = runpod.serverless.register_fitness_check
    register(lambda: register(server.up.wait))
    try:  # the SDK would end in a traceback, or take another job instead
        json.loads(given.test_input or '{"input": {}}')["input"]
    except (ValueError, TypeError, KeyError):
        end(1, '--test_input must be JSON such as {"input": {"message": "Hello"}}.')
    try:
        if given.test_input or given.rp_serve_api or not ON_RUNPOD:  # where the SDK checks nothing
            server.ready()
        # The handler of the local modes: the jobs of --rp_serve_api run side by side.
        runpod.serverless.start({"handler": lambda event: asyncio.to_thread(handler, event)})
    except JobError as error:
        end(1, str(error))
    except SystemExit as done:  # of the local modes
        end(int(done.code or 0), "the local run is done")
    end(0, "the API was stopped")


if __name__ == "__main__":
    main()
