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
"""

from __future__ import annotations

import argparse
import asyncio
import atexit
import collections
import contextlib
import contextvars
import ctypes
import functools
import http.client
import itertools
import json
import math
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
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

# What leaves for the caller: an SSE frame of the OpenAI route, or an object.
Piece = str | dict[str, Any]

# ---------------------------------------------------------------------------
# Settings: each from the environment, read once; the README lists them
# ---------------------------------------------------------------------------

ON_RUNPOD = "RUNPOD_WEBHOOK_GET_JOB" in os.environ  # set on the platform only: the SDK's own test

if not ON_RUNPOD:
    from dotenv import load_dotenv

    load_dotenv(Path(__file__).with_name(".env"))  # the real environment wins

os.environ.setdefault("RUNPOD_LOG_LEVEL", "INFO")  # the SDK's default logs every word of a caller


def setting(name: str, default: str, read: Callable[[str], Any], form: str) -> Any:
    """The value of environment variable `name`; a value that `read` refuses stops the start."""
    text = os.environ.get(name, "").strip() or default
    try:
        return read(text)
    except (ValueError, KeyError):
        raise SystemExit(f"{name} must be {form}, not {text!r}.") from None


def above_zero(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        value = kind(text)
        if not 0 < value < math.inf:
            raise ValueError
        return value

    return read


def host_and_port(text: str) -> tuple[str, int]:
    """OLLAMA_HOST as Ollama reads it: scheme and port may be missing; 0.0.0.0 is spoken to locally."""
    url = urlsplit(text if "://" in text else f"http://{text}")
    if url.scheme != "http":
        raise ValueError
    host = "127.0.0.1" if url.hostname in (None, "0.0.0.0", "::") else url.hostname
    return host, url.port or 11434


OLLAMA = setting("OLLAMA_HOST", "127.0.0.1:11434", host_and_port, "host:port, spoken to over http")
MODELS = setting("MODELS", "llama3:latest qwen2.5:7b", str.split, "model names, blanks between them")
MAX_CONCURRENCY = setting("MAX_CONCURRENCY", "8", above_zero(int), "a whole number above 0")
MAX_TOKENS = setting("MAX_TOKENS", "1024", above_zero(int), "a whole number above 0")
REQUEST_TIMEOUT = setting("REQUEST_TIMEOUT", "50", above_zero(float), "seconds above 0")
STARTUP_TIMEOUT = setting("STARTUP_TIMEOUT", "300", above_zero(float), "seconds above 0")
STREAMING = setting(
    "STREAMING", "true", lambda text: {"true": True, "false": False}[text.lower()], "true or false"
)
VAPI_ASSISTANT_ID = os.environ.get("VAPI_ASSISTANT_ID", "")
VAPI_FIRST_MESSAGE = os.environ.get("VAPI_FIRST_MESSAGE", "Hello! How can I help you?")
VAPI_TRANSFER_NUMBER = os.environ.get("VAPI_TRANSFER_NUMBER", "")
RUNPOD_ENDPOINT_ID = os.environ.get("RUNPOD_ENDPOINT_ID", "")  # the platform sets it
SYSTEM_PROMPT = os.environ.get(
    "SYSTEM_PROMPT",
    "You are a helpful assistant on a phone call. Answer briefly, in plain spoken sentences.",
)

# ---------------------------------------------------------------------------
# The handler: one job in, one answer out
# ---------------------------------------------------------------------------


class JobError(Exception):
    """Why a job fails, in words for its caller. `cure` says what could help: a TRIES key, or None."""

    def __init__(self, text: str, cure: str | None = None):
        super().__init__(text)
        self.cure = cure


class Job:
    """One job under way: its limit of time, its open connection, and what its log line tells."""

    def __init__(
        self, event: Any, streams: bool, seconds: float = REQUEST_TIMEOUT, limit: str = "REQUEST_TIMEOUT"
    ):
        self.id = event.get("id") if isinstance(event, dict) else None
        self.streams = streams  # whether pieces can reach the caller one by one
        self.kind, self.model, self.tokens = "-", "-", 0
        self.started = time.monotonic()
        self.first_token: float | None = None
        self.seconds, self.limit = seconds, limit
        self.parts: list[Job] = []  # tool calls under way, which end with the job
        self.stopped = False
        self._connection: socket.socket | None = None
        self._lock = threading.Lock()

    def left(self) -> float:
        """Seconds until the job's limit; raises JobError at the limit and once the job is stopped."""
        left = self.started + self.seconds - time.monotonic()
        if self.stopped:
            raise JobError("The job was cancelled.")
        if left <= 0:
            raise JobError(
                f"Not done within {self.limit}={self.seconds:g} s: ask for less, or raise it."
            )
        return left

    def part(self) -> Job:
        """A job within this one, with a connection of its own and the same end."""
        part = Job({"id": self.id}, streams=False)
        part.started = self.started
        self.parts.append(part)
        if self.stopped:
            part.stop()
        return part

    def holds(self, connection: socket.socket) -> None:
        with self._lock:
            self._connection = connection
        self.left()  # a stop that came just before found no connection to shut

    def stop(self) -> None:
        """Ends the job's generation at once, from any thread: Ollama stops when its client is gone."""
        self.stopped = True
        with self._lock:
            if self._connection:
                with contextlib.suppress(OSError):
                    self._connection.shutdown(socket.SHUT_RDWR)
        for part in self.parts:
            part.stop()

    def token(self, model: str) -> None:
        self.model = model
        self.tokens += 1
        self.first_token = self.first_token or time.monotonic()


def handler(event: dict[str, Any]) -> dict[str, Any]:
    """Answers one RunPod job {"id": str, "input": {…}} with one object that JSON can write.

    Never raises and never streams. A failure is {"error": "<one line>", "status": "error"}.
    """
    *_, last = answer(event, Job(event, streams=False))
    return last  # type: ignore[return-value]


def answer(event: Any, job: Job) -> Iterator[Piece]:
    """The core of every mode: yields a job's pieces; here alone an error becomes the answer."""
    status = "error"
    try:
        yield from map(sendable, dispatch(event, job))
        status = "success"
    except JobError as error:
        status = "stopped" if job.stopped else "error"
        yield failure(str(error))
    except RecursionError:
        yield failure("The input is nested too deeply; send it flatter.")
    except Exception as error:
        # A defect. Its text may hold a caller's words, so the log names only its place.
        *_, place = traceback.walk_tb(error.__traceback__)
        where = f"{type(error).__name__} in line {place[1]}"
        log(f"defect: {where}", job)
        yield failure(f"The worker failed on this job ({where}); please report it.")
    finally:
        log_job(job, status)


def dispatch(event: Any, job: Job) -> Iterator[Piece]:
    input = event.get("input") if isinstance(event, dict) else None
    if not isinstance(input, dict):
        raise JobError('A job needs an "input" object, such as {"input": {"message": "Hello"}}.')
    kinds = {"chat": chat, "vapi_webhook": vapi_webhook}
    kind = input.get("type", "chat")
    if input.get("openai_route") is not None:
        job.kind = "openai"
        return openai(input, job)
    if not isinstance(kind, str) or kind not in kinds:
        raise JobError(f'Unknown type {shown(kind)}; "type" can be "chat" or "vapi_webhook".')
    job.kind = kind
    return kinds[kind](input, job)


def failure(text: str) -> dict[str, Any]:
    return {"error": one_line(text.encode("utf-8", "replace").decode())[:2000], "status": "error"}


def one_line(text: str) -> str:
    return " ".join(text.split())


def sendable(piece: Piece) -> Piece:
    """The piece without what the SDK cannot post (it would post nothing): lone surrogates, NaN."""
    if isinstance(piece, str):
        return piece
    text = json.dumps(piece, ensure_ascii=False).encode("utf-8", "replace")
    return json.loads(text, parse_constant=lambda _: None)


def shown(value: Any) -> str:
    """A value of the caller's, short enough to stand in an error."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def log(text: str, job: Job | None = None) -> None:
    print(f"{job.id} | {text}" if job else text, file=sys.stderr, flush=True)


def log_job(job: Job, status: str) -> None:
    """One line a job, and nothing of its content: not even a model's name that no model answers to."""
    line = f"kind={job.kind} model={job.model} status={status}"
    if job.first_token:
        seconds = time.monotonic() - job.first_token
        first_ms = 1000 * (job.first_token - job.started)
        line += f" first_token_ms={first_ms:.0f} tokens={job.tokens}"
        line += f" tokens_per_s={job.tokens / seconds:.1f}" if seconds else ""
    log(line, job)


# ---------------------------------------------------------------------------
# Chat jobs
# ---------------------------------------------------------------------------

CHAT_FIELDS = ("options", "format", "tools", "think")  # go to Ollama as they are


def chat(input: dict[str, Any], job: Job) -> Iterator[Piece]:
    """Yields {"status", "response", "model", "usage", "timings", "thinking"?, "tool_calls"?}.

    With "stream": true, {"response": "<text>"} for each token and a last piece without "response".
    Shapes: https://github.com/ollama/ollama/blob/main/docs/api.md
    """
    body = chat_body(input)
    streams = wants_stream(input, job)
    yield from tried(job, lambda: chat_pieces(body, streams, job))


def chat_body(input: dict[str, Any]) -> dict[str, Any]:
    body = {field: input[field] for field in CHAT_FIELDS if input.get(field) is not None}
    body["model"] = model_name(input.get("model"))
    body["messages"] = chat_messages(input)
    body["stream"] = True  # always, so that a job can be stopped between two tokens
    body.setdefault("think", False)  # thinking is dead air unless it is asked for
    options = body.setdefault("options", {})
    if not isinstance(options, dict):
        raise JobError('"options" must be an object of Ollama\'s options, such as {"temperature": 0}.')
    body["options"] = {**options, "num_predict": max_tokens(options.get("num_predict"))}
    return body


def chat_messages(input: dict[str, Any]) -> list[dict[str, Any]]:
    message, messages, system = (input.get(name) for name in ("message", "messages", "system"))
    if (message is None) == (messages is None):
        raise JobError('A chat needs "message", a text, or "messages", a list of turns (not both).')
    if message is not None:
        if not isinstance(message, str) or not message.strip():
            raise JobError('"message" must be a text that is not empty.')
        messages = [{"role": "user", "content": message}]
    turns = turns_of(messages)
    if system is not None and not isinstance(system, str):
        raise JobError('"system" must be a text.')
    if system is None and not any(turn["role"] == "system" for turn in turns):
        system = SYSTEM_PROMPT
    return [{"role": "system", "content": system}, *turns] if system else turns


def turns_of(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise JobError('"messages" must be a list of turns that is not empty.')
    for turn in messages:
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            raise JobError('Each of "messages" must be like {"role": "user", "content": "…"}.')
    return messages


def chat_pieces(body: dict[str, Any], streams: bool, job: Job) -> Iterator[Piece]:
    texts: list[str] = []
    thoughts: list[str] = []
    tool_calls: list[Any] = []
    last: dict[str, Any] = {}
    for line in exchange(job, "POST", "/api/chat", body):
        chunk = json.loads(line)
        if "error" in chunk:
            raise JobError(f"Ollama: {words_of(chunk)}", cure="new runner")
        message = chunk.get("message") or {}
        thoughts.append(message.get("thinking") or "")
        tool_calls += message.get("tool_calls") or []
        if chunk.get("done"):
            last = chunk
        else:
            job.token(chunk["model"])
        if text := message.get("content"):
            texts.append(text)
            if streams:
                yield {"response": text}
    if not last:
        raise JobError("Ollama's answer broke off before its end; try again.", cure="new runner")
    job.tokens = last.get("eval_count", job.tokens)
    yield {
        "status": "success",
        **({} if streams else {"response": "".join(texts)}),
        "model": last["model"],
        **({"thinking": "".join(thoughts)} if any(thoughts) else {}),
        **({"tool_calls": tool_calls} if tool_calls else {}),
        **counts(last),
    }


def counts(last: dict[str, Any]) -> dict[str, Any]:
    """Tokens and times (s) from the closing line of /api/chat, whose durations are in ns."""
    prompt, completion = last.get("prompt_eval_count", 0), last.get("eval_count", 0)
    durations = {
        "load_s": "load_duration",
        "prompt_s": "prompt_eval_duration",
        "generate_s": "eval_duration",
        "total_s": "total_duration",
    }
    return {
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        },
        "timings": {name: last.get(field, 0) / 1e9 for name, field in durations.items()},
    }


def model_name(name: Any) -> str:
    """The model to use: the first of MODELS where a job names none. No path, URL or cloud model."""
    if name in (None, ""):
        return MODELS[0]
    part = r"[A-Za-z0-9][\w.-]*"
    if not isinstance(name, str) or not re.fullmatch(rf"({part}/){{0,2}}{part}(:{part})?", name):
        raise JobError(f'"model" must be a model\'s name, such as {MODELS[0]!r}, not {shown(name)}.')
    if name.endswith(("-cloud", ":cloud")):  # Ollama would send the prompt to ollama.com
        raise JobError(f"{shown(name)} is a cloud model; this worker answers with its own models only.")
    return name


def max_tokens(wanted: Any) -> Any:
    """Ollama has no limit of its own, and reads 0 and less as none."""
    return MAX_TOKENS if wanted is None or (isinstance(wanted, (int, float)) and wanted <= 0) else wanted


def wants_stream(body: dict[str, Any], job: Job) -> bool:
    stream = body.get("stream") or False
    if not isinstance(stream, bool):
        raise JobError('"stream" must be true or false.')
    if stream and not job.streams:  # a plain answer where a stream is due is silence on a call
        raise JobError(
            '"stream": true works only on a RunPod endpoint that runs with STREAMING=true; '
            'leave "stream" out here.'
        )
    return stream


# ---------------------------------------------------------------------------
# The OpenAI route, which VAPI's custom-llm calls
# ---------------------------------------------------------------------------

# What may pass, and the fields that Ollama knows in its body; a route without fields is a GET.
ROUTES: dict[str, list[str]] = {
    "/v1/models": [],
    "/v1/models/{model}": [],
    "/v1/chat/completions": (
        "model messages stream stream_options max_tokens seed stop temperature top_p "
        "frequency_penalty presence_penalty response_format tools reasoning reasoning_effort "
        "logprobs top_logprobs"
    ).split(),
    "/v1/completions": (
        "model prompt suffix stream stream_options max_tokens seed stop temperature top_p "
        "frequency_penalty presence_penalty logprobs"
    ).split(),
    "/v1/embeddings": "model input dimensions encoding_format".split(),
}


def openai(input: dict[str, Any], job: Job) -> Iterator[Piece]:
    """Answers {"openai_route", "openai_input"} as Ollama's own /v1 does: SSE frames, or one object.

    Shapes: https://github.com/ollama/ollama/blob/main/docs/api/openai-compatibility.mdx
    """
    route, body = input["openai_route"], input.get("openai_input")
    if not isinstance(route, str):
        raise JobError(f'"openai_route" must be a path such as "/v1/models", not {shown(route)}.')
    # Users paste a URL that already ends so, and VAPI's client adds the path again.
    route = route.replace("/chat/completions/chat/completions", "/chat/completions", 1)
    base, _, name = route.partition("/v1/models/")
    known = "/v1/models/{model}" if name and not base else route
    if known not in ROUTES:
        raise JobError(f"Unknown route {shown(route)}; there is {', '.join(ROUTES)}.")
    if not ROUTES[known]:
        path = f"/v1/models/{model_name(name)}" if name else route
        yield from tried(job, lambda: iter([ask(job, "GET", path)]))
        return
    if not isinstance(body, dict):
        raise JobError(f'"openai_input" must be the JSON object that {route} takes.')
    streams = wants_stream(body, job)
    body = openai_body(route, body)
    if route == "/v1/embeddings":
        yield from tried(job, lambda: iter([ask(job, "POST", route, body)]))
    else:
        yield from tried(job, lambda: completion_pieces(route, body, streams, job))


def openai_body(route: str, sent: dict[str, Any]) -> dict[str, Any]:
    """What of a body goes on: VAPI adds private fields, such as the caller's number; they stop here."""
    body = {field: sent[field] for field in ROUTES[route] if sent.get(field) is not None}
    body["model"] = model_name(body.get("model"))
    if "max_tokens" in ROUTES[route]:
        limit = body.get("max_tokens") or sent.get("max_completion_tokens")  # OpenAI's newer name
        body["max_tokens"] = max_tokens(limit)
    if route == "/v1/chat/completions":
        if isinstance(body.get("messages"), list):
            body["messages"] = [mended(turn) for turn in body["messages"]]
        if "reasoning" not in body:  # thinking is dead air on a call
            body.setdefault("reasoning_effort", "none")
    return body


def mended(turn: Any) -> Any:
    """A turn as Ollama takes it: it refuses the `content: null` and `arguments: ""` that VAPI sends."""
    if not isinstance(turn, dict):
        return turn
    turn = {**turn, "content": "" if turn.get("content") is None else turn["content"]}
    if isinstance(turn.get("tool_calls"), list):
        turn["tool_calls"] = [with_arguments(call) for call in turn["tool_calls"]]
    return turn


def with_arguments(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return call
    arguments = function.get("arguments") or "{}"
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments)
    return {**call, "function": {**function, "arguments": arguments}}


def completion_pieces(route: str, body: dict[str, Any], streams: bool, job: Job) -> Iterator[Piece]:
    """The frames of Ollama's stream as they come, or the one completion that they make."""
    if body.get("tools") and not takes_tools(body["model"], job):
        body = {field: value for field, value in body.items() if field != "tools"}
    if not streams:
        body = {**body, "stream_options": {"include_usage": True}}
    chunks: list[dict[str, Any]] = []
    finished = False
    for line in exchange(job, "POST", route, {**body, "stream": True}):
        if not line.startswith(b"data: {"):
            continue
        chunk = json.loads(line[6:])
        if "error" in chunk:
            raise JobError(f"Ollama: {words_of(chunk)}", cure="new runner")
        if not chunk.get("model"):  # the last frame of a runner that died; no word of it else
            break
        if any(choice.get("finish_reason") for choice in chunk["choices"]):
            finished = True
        elif chunk["choices"]:
            job.token(chunk["model"])
        if streams:
            yield line.decode("utf-8", "replace") + "\n\n"
        else:
            chunks.append(chunk)
    if not finished:
        raise JobError("Ollama's answer broke off before its end; try again.", cure="new runner")
    yield "data: [DONE]\n\n" if streams else joined(chunks)


def joined(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """One completion from the chunks of its stream, as /v1 answers without `stream`."""
    last = chunks[-1]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    choice: dict[str, Any] = {"index": 0}
    if last["object"] == "text_completion":
        choice["text"] = "".join(part.get("text") or "" for part in choices)
    else:
        deltas = [part.get("delta") or {} for part in choices]
        message = {"role": "assistant", "content": text_of(deltas, "content")}
        if reasoning := text_of(deltas, "reasoning"):
            message["reasoning"] = reasoning
        if tool_calls := [call for delta in deltas for call in delta.get("tool_calls") or []]:
            message["tool_calls"] = tool_calls
        choice["message"] = message
    choice["finish_reason"] = next(part["finish_reason"] for part in choices if part["finish_reason"])
    if logprobs := [part["logprobs"] for part in choices if part.get("logprobs")]:
        choice["logprobs"] = {"content": [one for part in logprobs for one in part["content"]]}
    return {
        **{field: last[field] for field in ("id", "created", "model", "system_fingerprint")},
        "object": last["object"].removesuffix(".chunk"),
        "choices": [choice],
        "usage": last.get("usage"),
    }


def text_of(deltas: list[dict[str, Any]], field: str) -> Any:
    return "".join(delta.get(field) or "" for delta in deltas)


def takes_tools(model: str, job: Job) -> bool:
    """Whether `model` takes tools. Ollama answers 400 where it does not, which would end the call."""
    if model not in TAKES_TOOLS:
        TAKES_TOOLS[model] = "tools" in capabilities(model, job)
        if not TAKES_TOOLS[model]:
            able = [name for name in installed(job) if "tools" in capabilities(name, job)]
            advice = f"{able[0]} takes them" if able else "qwen2.5:7b or llama3.1:8b would take them"
            log(f"warning: {model} takes no tools, so they are dropped; {advice}")
    return TAKES_TOOLS[model]


TAKES_TOOLS: dict[str, bool] = {}  # by model: asked once


def capabilities(model: str, job: Job) -> list[str]:
    return ask(job, "POST", "/api/show", {"model": model}).get("capabilities") or []


# ---------------------------------------------------------------------------
# VAPI's server messages: https://docs.vapi.ai/server-url/events
# ---------------------------------------------------------------------------


def vapi_webhook(input: dict[str, Any], job: Job) -> Iterator[Piece]:
    """Yields {"status", "vapi_response", "call_id"} for `webhook_data`: VAPI's own body, or a text.

    `vapi_response` is the object that VAPI wants, or the model's answer to the text.
    """
    data = input.get("webhook_data")
    message = data.get("message") if isinstance(data, dict) else None
    if not isinstance(message, (str, dict)):
        raise JobError(
            '"webhook_data" must be VAPI\'s body, {"message": {"type": …}}, or {"message": "a text"}.'
        )
    if isinstance(message, str):
        speaking_for.set(job)
        response: Any = ask_model(message)
    else:
        response = VAPI_MESSAGES.get(str(message.get("type")), {})  # a type only told, or a new one
        if callable(response):
            response = response(message, job)
    yield {"status": "success", "vapi_response": response, "call_id": call_id_of(message, data)}


def call_id_of(message: Any, data: Any) -> str:
    call = message.get("call") if isinstance(message, dict) else None
    ids = [part.get(key) for part, key in ((call, "id"), (data, "call_id")) if isinstance(part, dict)]
    return next((each for each in ids if isinstance(each, str)), "")


def ask_model(message: str) -> str:
    """The model's answer to a text; as a tool, what a caller's assistant may ask it in a call."""
    *_, last = chat({"message": message}, speaking_for.get())
    return last["response"]  # type: ignore[index]


# The tools of `tool-calls`: an owner adds a function of their own, which takes the call's arguments
# by name and returns a text. Those of one message run side by side, each in a thread.
TOOLS: dict[str, Callable[..., Any]] = {"ask_model": ask_model}
TOOL_SECONDS = 15  # VAPI waits 20 s for all results
speaking_for: contextvars.ContextVar[Job] = contextvars.ContextVar("speaking_for")


def tool_calls(message: dict[str, Any], job: Job) -> dict[str, Any]:
    """Runs the calls of one message; {"results": […]} in the order of the calls."""
    listed = message.get("toolCallList")
    calls = [call for call in listed if isinstance(call, dict)] if isinstance(listed, list) else []
    late = {"error": f"The tool took longer than {TOOL_SECONDS} s."}
    results = [late for _ in calls]
    parts = [job.part() for _ in calls]
    places = iter(range(len(calls)))  # shared by the threads: each takes the next

    def run() -> None:
        for place in places:
            speaking_for.set(parts[place])
            results[place] = tool_result(calls[place])

    end = time.monotonic() + min(TOOL_SECONDS, job.left())
    threads = [threading.Thread(target=run, daemon=True) for _ in calls[:32]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0, end - time.monotonic()))
    answered = list(results)
    for part in parts:
        part.stop()
    job.left()
    return {
        "results": [
            {"toolCallId": call.get("id", ""), "name": name_of(call), **result}
            for call, result in zip(calls, answered, strict=True)
        ]
    }


def tool_result(call: dict[str, Any]) -> dict[str, str]:
    """{"result": text} of one call, or {"error": text}: the model never makes an answer up."""
    name = name_of(call)
    if name not in TOOLS:
        return {"error": one_line(f"There is no tool {shown(name)}; there is {', '.join(TOOLS)}.")}
    try:
        result = TOOLS[name](**arguments_of(call))
        return {"result": one_line(result if isinstance(result, str) else json.dumps(result))}
    except Exception as error:
        return {"error": one_line(f"{name} failed: {error}")}


def name_of(call: dict[str, Any]) -> str:
    function = call.get("function")
    name = (function if isinstance(function, dict) else call).get("name")
    return name if isinstance(name, str) else ""


def arguments_of(call: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments: VAPI sends an object or JSON text, inside `function` or flat."""
    function = call.get("function")
    function = function if isinstance(function, dict) else call
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str) and arguments.strip():
        try:
            arguments = json.loads(arguments)
        except ValueError:
            raise JobError("its arguments are not JSON.") from None
    if arguments and not isinstance(arguments, dict):
        raise JobError("its arguments must be a JSON object.")
    return arguments or {}


def function_call(message: dict[str, Any], job: Job) -> dict[str, Any]:
    """VAPI's older form of one tool call."""
    call = message.get("functionCall")
    (result,) = tool_calls({"toolCallList": [call if isinstance(call, dict) else {}]}, job)["results"]
    return {key: result[key] for key in ("result", "error") if key in result}


def assistant(_message: dict[str, Any], _job: Job) -> dict[str, Any]:
    """Who takes a call. VAPI waits 7.5 s, so the model is never asked."""
    if VAPI_ASSISTANT_ID:
        return {"assistantId": VAPI_ASSISTANT_ID}
    if not RUNPOD_ENDPOINT_ID:
        return {"error": "No assistant is set up for this number."}
    model = {
        "provider": "custom-llm",
        "url": f"https://api.runpod.ai/v2/{RUNPOD_ENDPOINT_ID}/openai/v1",
        "model": MODELS[0],
        "messages": [{"role": "system", "content": SYSTEM_PROMPT}],
    }
    return {"assistant": {"firstMessage": VAPI_FIRST_MESSAGE, "model": model}}


def transfer(_message: dict[str, Any], _job: Job) -> dict[str, Any]:
    if not VAPI_TRANSFER_NUMBER:
        return {"error": "There is no number to transfer to; VAPI_TRANSFER_NUMBER sets one."}
    return {"destination": {"type": "number", "number": VAPI_TRANSFER_NUMBER}}


def handoff(_message: dict[str, Any], _job: Job) -> dict[str, Any]:
    if not VAPI_ASSISTANT_ID:
        return {"error": "There is no assistant to hand off to; VAPI_ASSISTANT_ID sets one."}
    return {"destination": {"type": "assistant", "assistantId": VAPI_ASSISTANT_ID}}


def end_of_call(message: dict[str, Any], job: Job) -> dict[str, Any]:
    """Logs how a call ended: identifiers and a number, nothing that was said."""
    call_id, reason = identifier(call_id_of(message, None)), identifier(message.get("endedReason"))
    log(f"call={call_id} ended: {reason} after {duration_of(message)} s", job)
    return {}


def identifier(value: Any) -> str:
    """`value` for the log, if it can only be an identifier and not somebody's words."""
    return value if isinstance(value, str) and re.fullmatch(r"[\w.-]{1,100}", value) else "-"


def duration_of(message: dict[str, Any]) -> float | str:
    """A call's length in s: from VAPI's schema its two times; in captures also the number itself."""
    seconds = message.get("durationSeconds")
    if isinstance(seconds, (int, float)):
        return seconds
    try:
        started, ended = (
            datetime.fromisoformat(message[time_of].replace("Z", "+00:00"))
            for time_of in ("startedAt", "endedAt")
        )
        return (ended - started).total_seconds()
    except (KeyError, AttributeError, ValueError, TypeError):
        return "-"


# A message's type, and its answer or what makes it.
VAPI_MESSAGES: dict[str, dict[str, Any] | Callable[[dict[str, Any], Job], dict[str, Any]]] = {
    "assistant-request": assistant,
    "tool-calls": tool_calls,
    "function-call": function_call,
    "transfer-destination-request": transfer,
    "handoff-destination-request": handoff,
    "knowledge-base-request": {"documents": []},
    "call.endpointing.request": {"timeoutSeconds": 0.5},
    "campaign.predial": {"eligible": True},
    "voice-request": {"error": "This worker makes no audio; choose one of VAPI's voices."},
    "end-of-call-report": end_of_call,
}


# ---------------------------------------------------------------------------
# The Ollama client
# ---------------------------------------------------------------------------

TRIES = {"new runner": 2, "free place": 3}


def tried(job: Job, attempt: Callable[[], Iterator[Piece]]) -> Iterator[Piece]:
    """Runs `attempt` again where that can help, as long as nothing of it has left."""
    for tries in itertools.count(1):
        server.ready(job, again=tries > 1)
        sent = False
        try:
            for piece in attempt():
                sent = True
                yield piece
            return
        except JobError as error:
            if sent or tries >= TRIES.get(error.cure or "", 1):
                raise
            if error.cure == "free place":
                time.sleep(min(0.5 * tries, job.left()))


def exchange(job: Job, method: str, path: str, body: dict[str, Any] | None = None) -> Iterator[bytes]:
    """Sends one request to Ollama and yields the lines of its answer as they come.

    Closing it, or job.stop(), ends what Ollama does for it. The standard library's client, because
    its socket is at hand for that while no byte has come; `requests` would also take 0.17 s to
    import before the server is started.
    """
    data = request_body(body) if body is not None else None
    connection = http.client.HTTPConnection(OLLAMA[0], OLLAMA[1], timeout=job.left())
    try:
        connection.connect()
        wire = connection.sock
        job.holds(wire)
        connection.request(method, path, data, {"Content-Type": "application/json"})
        with contextlib.closing(connection.getresponse()) as response:
            if response.status != 200:
                refuse(response.status, response.read(), job)
            rest = b""
            while piece := response.read1(65536):
                *lines, rest = (rest + piece).split(b"\n")
                yield from filter(None, lines)
                wire.settimeout(job.left())
            if rest:
                yield rest
    except (OSError, http.client.HTTPException) as error:
        job.left()  # a stop or the limit breaks the connection too: that is then the reason
        raise JobError(
            f"The connection to Ollama broke ({type(error).__name__}); try again.", "new runner"
        ) from None
    finally:
        connection.close()


def ask(job: Job, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """A question to Ollama that is answered with one JSON value."""
    return json.loads(b"".join(exchange(job, method, path, body)))


def request_body(body: dict[str, Any]) -> bytes:
    try:
        return json.dumps(body, allow_nan=False).encode()
    except (TypeError, ValueError):
        raise JobError("The input holds what JSON cannot: NaN, infinity, or bytes.") from None


def refuse(status: int, content: bytes, job: Job) -> NoReturn:
    """Raises Ollama's refusal in its own words, with what would help."""
    try:
        text = words_of(json.loads(content))
    except ValueError:
        text = content.decode("utf-8", "replace")
    if status == 404 and "not found" in text:
        text += f"; installed: {', '.join(installed(job)) or 'none'}"
    cure = "free place" if status == 503 else "new runner" if "runner" in text else None
    raise JobError(f"Ollama ({status}): {text}", cure)


def words_of(body: Any) -> str:
    """The text of Ollama's two error shapes, {"error": str} and {"error": {"message": str}}."""
    error = body.get("error", body) if isinstance(body, dict) else body
    return str(error.get("message", error) if isinstance(error, dict) else error)


def installed(job: Job) -> list[str]:
    return [model["name"] for model in ask(job, "GET", "/api/tags")["models"]]


# ---------------------------------------------------------------------------
# The server's life
# ---------------------------------------------------------------------------

SERVER_ENVIRONMENT = {  # of a server that the worker starts; what the environment already sets, wins
    "OLLAMA_KEEP_ALIVE": "-1",
    "OLLAMA_NO_CLOUD": "1",  # else a prompt for a ":cloud" model goes to ollama.com
    "OLLAMA_NUM_PARALLEL": str(MAX_CONCURRENCY),  # Ollama's default is 1: the other jobs would queue
    "OLLAMA_CONTEXT_LENGTH": "4096",  # tokens for each job; memory grows with it times the jobs
}
DEATHS, WITHIN = 5, 600  # so many deaths of the server within so many s end the worker


class Server:
    """The Ollama server beside the worker: found running, or started, kept alive and ended."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.settled = threading.Event()  # it answers, or `failure` says why it does not
        self.failure = ""
        self.ended = False
        self.must_load = False  # a worker on RunPod is not ready without its model
        self.on_failure: Callable[[], object] = lambda: None
        self._keeper: threading.Thread | None = None
        self._reader: threading.Thread | None = None
        self._last_words: collections.deque[bytes] = collections.deque(maxlen=20)
        self._lock = threading.Lock()

    def start(self) -> None:
        """Begins to find or start the server, in a thread; once, or anew after a failure."""
        with self._lock:
            kept = self._keeper is not None and self._keeper.is_alive()
            if kept or self.ended or (self.settled.is_set() and not self.failure):
                return
            self.settled.clear()
            self.failure = ""
            self._keeper = threading.Thread(target=self._keep, daemon=True)
            self._keeper.start()

    def ready(self, job: Job, again: bool = False) -> None:
        """Waits until the server answers, within the job's time; `again` after a broken connection."""
        self.start()
        while True:
            while not self.settled.wait(min(0.1, job.left())):
                pass
            if self.failure:
                raise JobError(self.failure)
            if not again or answers():
                return
            if self.process is None:  # somebody else's server, and it is gone: look anew
                self.settled.clear()
                self.start()
            time.sleep(min(0.05, job.left()))

    def stop(self, grace: float = 5) -> None:
        """Ends the server that the worker started: asks it, and after `grace` s ends it by force."""
        self.ended = True
        if self.process:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(grace)
            self._sweep()

    def _keep(self) -> None:
        """The keeper's thread. It lives as long as the server, which gets a signal when it ends."""
        try:
            if answers():
                if self.must_load:
                    self._load(starting())
            else:
                self._begin()
        except Exception as error:  # a defect too: whoever waits for the server must hear of it
            return self._fail(reason_of(error), self._last_words)
        self.settled.set()
        if self.process:
            self._watch()

    def _watch(self) -> None:
        """Starts the server again whenever it ends, after a growing pause, up to DEATHS in WITHIN s."""
        deaths: list[float] = []
        while True:
            assert self.process
            code = self.process.wait()
            self.settled.clear()
            self._sweep()
            if self.ended:
                return
            now = time.monotonic()
            deaths = [death for death in deaths if now - death < WITHIN] + [now]
            if len(deaths) >= DEATHS:
                return self._fail(
                    f"Ollama ended {DEATHS} times within {WITHIN} s, the last with {code}."
                )
            pause = 0.1 * 2 ** len(deaths)
            log(f"warning: Ollama ended with {code}; it is started again in {pause:g} s")
            time.sleep(pause)
            try:
                self._begin()
                self.settled.set()
            except Exception as error:
                log(f"warning: {reason_of(error)}")
                self.process.kill()

    def _begin(self) -> None:
        """Starts the server, waits until it listens and loads the default model."""
        job = starting()
        process = self._spawn()
        while not listens():
            if process.poll() is not None:
                raise JobError(f"`ollama serve` ended with {process.returncode} before it answered.")
            time.sleep(min(0.02, job.left()))
        self._load(job)

    def _spawn(self) -> subprocess.Popen[bytes]:
        address = f"[{OLLAMA[0]}]:{OLLAMA[1]}" if ":" in OLLAMA[0] else f"{OLLAMA[0]}:{OLLAMA[1]}"
        ollama = shutil.which("ollama")
        if not ollama:
            raise JobError(
                f"No Ollama server answers at {address}, and `ollama` is not on PATH: get it from "
                "https://ollama.com/download, or set OLLAMA_HOST to a server that runs."
            )
        if OLLAMA[0] not in ("localhost", "::1") and not OLLAMA[0].startswith("127."):
            raise JobError(
                f"No Ollama server answers at {address}, and the worker starts one on loopback only: "
                "set OLLAMA_HOST to 127.0.0.1:11434, or to a server that runs."
            )
        self._last_words.clear()
        try:
            self.process = process = subprocess.Popen(
                [ollama, "serve"],
                env={**SERVER_ENVIRONMENT, **os.environ, "OLLAMA_HOST": address},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the worker, which lets its jobs finish first
                preexec_fn=functools.partial(end_with_parent, signal.SIGTERM, os.getpid()),
            )
        except OSError as error:
            raise JobError(f"{ollama} could not be started: {error.strerror}.") from None
        atexit.register(self.stop)
        assert process.stdout
        # Read, so that it never blocks, and kept from the log: it may one day hold a caller's words.
        self._reader = threading.Thread(
            target=self._last_words.extend, args=(process.stdout,), daemon=True
        )
        self._reader.start()
        return process

    def _load(self, job: Job) -> None:
        try:
            load = ask(job, "POST", "/api/generate", {"model": MODELS[0], "keep_alive": -1})
            if "error" in load:
                raise JobError(words_of(load))
        except JobError as error:
            if self.must_load:
                raise JobError(f"{MODELS[0]} could not be loaded. {error}") from None
            log(f"warning: {MODELS[0]} could not be loaded. {error}")

    def _fail(self, reason: str, last_words: Iterable[bytes] = ()) -> None:
        """The end of the keeper: says why. The server's words only while no caller's can be in them."""
        if self.process:
            self.process.kill()
            self._sweep()
        if self._reader:
            self._reader.join(0.2)
        log(f"error: {reason}")
        for line in last_words:
            log(f"ollama: {line.decode('utf-8', 'replace').rstrip()}")
        # On RunPod the worker is replaced; on a laptop the next job tries anew.
        self.ended = self.must_load
        self.failure = reason
        self.settled.set()
        self.on_failure()

    def _sweep(self) -> None:
        """Ends the runners that a killed server leaves behind; they hold the GPU's memory."""
        assert self.process
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)


def reason_of(error: Exception) -> str:
    return str(error) if isinstance(error, JobError) else repr(error)


def starting() -> Job:
    """The start of the server as a job: its limit bounds the start and the load together."""
    return Job(None, streams=False, seconds=STARTUP_TIMEOUT, limit="STARTUP_TIMEOUT")


def listens() -> bool:
    try:
        socket.create_connection(OLLAMA, timeout=1).close()
        return True
    except OSError:
        return False


def answers() -> bool:
    """Whether an Ollama server answers at OLLAMA_HOST."""
    try:
        return bool(ask(Job(None, streams=False, seconds=2), "GET", "/api/version"))
    except (JobError, ValueError):
        return False


def end_with_parent(signum: int, parent: int) -> None:
    """In a child before its exec: lets the kernel signal it when its parent ends, even by SIGKILL."""
    if PRCTL:
        PRCTL(1, signum)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)


# Of Linux only. Looked up here and not in the child, where the linker's lock may be held for ever by a
# thread that is not there: the SDK's import loads libraries while the server is started.
PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
server = Server()

# ---------------------------------------------------------------------------
# The worker: RunPod's loop around the handler
# ---------------------------------------------------------------------------

CHUNK_BYTES = 512 * 1024  # RunPod's limit for a streamed chunk is 1 MB, and JSON may double quotes


class Run:
    """A job's thread, and what has come of it for the event loop."""

    def __init__(self, event: Any, streams: bool):
        self.job = Job(event, streams)
        self.pieces: collections.deque[Piece | None] = collections.deque()
        self.arrived = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._work, args=(event,), daemon=True).start()

    def _work(self, event: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the worker has ended
            for piece in itertools.chain(answer(event, self.job), [None]):
                self.pieces.append(piece)
                self._loop.call_soon_threadsafe(self.arrived.set)


head_starts: dict[Any, Run] = {}  # by job id


async def bridge(event: dict[str, Any], streams: bool) -> AsyncIterator[Piece]:
    """The core for an event loop: yields what has come of a job's thread meanwhile.

    The SDK awaits one POST a yield; what comes in that time leaves together with the next.
    """
    run = head_starts.pop(event.get("id"), None) or Run(event, streams)
    task = asyncio.current_task()
    assert task
    # A cancel lands in the SDK's own await and reaches no `finally` here, but it ends the task.
    task.add_done_callback(lambda _: run.job.stop())
    while True:
        await run.arrived.wait()
        run.arrived.clear()
        while run.pieces:
            piece = gathered(run.pieces)
            if piece is None:
                return
            yield piece


def gathered(pieces: collections.deque[Piece | None]) -> Piece | None:
    """Takes the first of `pieces`, and as many of the next as fit into one chunk with it."""
    piece = pieces.popleft()
    size = len(json.dumps(piece))
    while piece is not None and pieces:
        both = merged(piece, pieces[0])
        size += len(json.dumps(pieces[0]))
        if both is None or size > CHUNK_BYTES:
            break
        piece = both
        pieces.popleft()
    return piece


def merged(piece: Piece, following: Piece | None) -> Piece | None:
    """Two pieces in one, where they are frames or texts of a chat; else None."""
    if isinstance(piece, str) and isinstance(following, str):
        return piece + following
    if not isinstance(piece, dict) or not isinstance(following, dict):
        return None
    if not piece.keys() == following.keys() == {"response"}:
        return None
    return {"response": piece["response"] + following["response"]}


async def plain_handler(event: dict[str, Any]) -> Piece:
    """The handler where nothing streams; async, so that jobs run side by side."""
    return [piece async for piece in bridge(event, streams=False)][-1]


def serve_queue() -> None:
    """Takes jobs from the endpoint's queue until a signal, or a server that cannot be kept, ends it."""
    import runpod
    from runpod.serverless.modules import rp_scale

    def model_is_loaded() -> None:
        """The SDK's check before the first job-take: its failure ends the process and tells RunPod."""
        server.settled.wait()
        if server.failure:
            raise RuntimeError(server.failure)

    def concurrency(_current: int) -> int:  # the SDK calls it before each job-take
        watch_signals()
        return 3 * MAX_CONCURRENCY  # more than it can count: job_take keeps to MAX_CONCURRENCY

    rp_scale.get_job = job_take_of(rp_scale.get_job)
    rp_scale.get_stop_signals = job_stop_of(rp_scale.get_stop_signals)
    runpod.serverless.register_fitness_check(model_is_loaded)
    runpod.serverless.start(
        {
            "handler": functools.partial(bridge, streams=True) if STREAMING else plain_handler,
            "return_aggregate_stream": True,  # else /runsync answers an empty list
            "concurrency_modifier": concurrency,
        }
    )


stopping = asyncio.Event()


def job_take_of(take: Callable[..., Any]) -> Callable[..., Any]:
    """The SDK's job-take, with what SDK 1.12 does to a caller mended:

    - It counts a job in its own queue twice, so half of a burst waits: the count is made here.
    - It calls the handler up to 0.1 s after it has the job: the job's thread starts here.
    - Its long poll goes on after SIGTERM, and what that brings is never run: it is given up.
    """

    async def job_take(session: Any, _wanted: int = 1) -> Any:
        while not stopping.is_set() and jobs_under_way() >= MAX_CONCURRENCY:
            await asyncio.sleep(0.02)
        if not stopping.is_set():
            taking = asyncio.ensure_future(take(session, MAX_CONCURRENCY - jobs_under_way()))
            stop = asyncio.ensure_future(stopping.wait())
            try:
                await asyncio.wait({taking, stop}, return_when=asyncio.FIRST_COMPLETED)
                if taking.done():
                    for event in taking.result() or []:
                        head_starts[event["id"]] = Run(event, STREAMING)
                    return taking.result()
            finally:
                taking.cancel()
                stop.cancel()
        return await asyncio.Event().wait()  # for ever: no further job

    return job_take


def jobs_under_way() -> int:
    from runpod.serverless.modules.worker_state import JobsProgress

    return JobsProgress().get_job_count()


def job_stop_of(take: Callable[..., Any]) -> Callable[..., Any]:
    """The SDK's job-stop, which knows no job before its handler runs: those are stopped here."""

    async def job_stop(*args: Any) -> Any:
        job_ids = await take(*args)
        for run in filter(None, map(head_starts.get, job_ids)):
            run.job.stop()
        return job_ids

    return job_stop


@functools.cache
def watch_signals() -> None:
    """In the SDK's loop: signals, and a server that cannot be kept, end the worker once it is idle."""
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stop_worker, 0)

    def stop_without_server() -> None:
        if not stopping.is_set():
            stop_worker(1)

    server.on_failure = lambda: loop.call_soon_threadsafe(stop_without_server)


def stop_worker(code: int) -> None:
    """Ends the worker with exit code `code` when its jobs are done; called again, at once."""
    if stopping.is_set():
        end_process(1, grace=0)
    stopping.set()
    log("stopping: no new job is taken, those under way finish")
    exit_when_idle(code)


def exit_when_idle(code: int, idle: int = 0) -> None:
    """Looks every 50 ms, thrice in a row: a job just taken is on its way into the SDK's list."""
    idle = 0 if jobs_under_way() else idle + 1
    if idle > 2:
        end_process(code)
    asyncio.get_running_loop().call_later(0.05, exit_when_idle, code, idle)


def end_process(code: int, grace: float = 5) -> NoReturn:
    """Ends all at once: the SDK's loop can swallow a cancel (asyncio.wait_for of 3.11) and go on."""
    server.stop(grace)
    sys.stdout.flush()
    os._exit(code)


def is_local() -> bool:
    """Whether the SDK will run local: its arguments say so, or the platform is not there."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--test_input")
    parser.add_argument("--rp_serve_api", action="store_true")
    given, _ = parser.parse_known_args()
    if given.test_input is not None:  # the SDK would end in a traceback, or take another job instead
        try:
            json.loads(given.test_input)["input"]
        except (ValueError, TypeError, KeyError):
            raise SystemExit(
                '--test_input must be JSON such as {"input": {"message": "Hello"}}.'
            ) from None
    return not ON_RUNPOD or given.rp_serve_api or given.test_input is not None


def main() -> None:
    local = is_local()
    for signum in (signal.SIGTERM, signal.SIGINT):  # until the SDK's loop has its own
        signal.signal(signum, lambda *_: sys.exit(0))
    os.register_at_fork(after_in_child=functools.partial(end_with_parent, signal.SIGKILL, os.getpid()))
    try:
        server.must_load = not local
        server.on_failure = (lambda: None) if local else exit_soon
        server.start()  # loads the model while the SDK is imported, which takes 1.5 s
        import runpod

        if local:
            server.settled.wait()
            if server.failure:
                raise SystemExit(1)
            runpod.serverless.start({"handler": plain_handler})
        else:
            serve_queue()
    finally:
        server.stop()


def exit_soon() -> None:
    """Ends a worker that never got ready, if the SDK's check, which may not run yet, did not do so."""
    time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    main()
