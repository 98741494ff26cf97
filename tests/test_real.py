"""The worker on an endpoint, against a real Ollama: what reaches the caller is Ollama's own answer.

    OLLAMA_TEST_HOST=127.0.0.1:11434 bash tests/run.sh    a server that runs
    OLLAMA_TEST_HOST=start bash tests/run.sh              the `ollama` on PATH: started, and killed

Models are chosen by what they can; OLLAMA_TEST_MODEL names the only one to use. Without
OLLAMA_TEST_HOST the tests' own Ollama answers, with its real small model.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import psutil
import pytest
import requests
from conftest import eventually, own_host, processes_at
from endpoint import Endpoint
from test_ollama_api import (
    CHAT,
    GENERATE,
    HELLO,
    REAL_HOST,
    STORY,
    TOOL,
    Server,
    chat_models,
    serving_a_real_model,
)

SLOW = {"REQUEST_TIMEOUT": "120"}  # s, for a model that is computed on a CPU
SHORT = {"message": "Hello", "options": {"num_predict": 1}}
ENDLESS = {
    "openai_route": "/v1/chat/completions",
    "openai_input": {"messages": STORY, "temperature": 0, "max_tokens": 100_000, "stream": True},
}
both = pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])


class Sides(NamedTuple):
    """The two that are asked: an endpoint with a worker, and the server that the worker has found."""

    endpoint: Endpoint
    ollama: Server
    models: dict[str, list[str]]  # the worker's default first

    def model(self, tools: bool) -> str:
        for name, can in self.models.items():
            if ("tools" in can) == tools:
                return name
        pytest.skip(f"no chat model {'with' if tools else 'without'} tools here")


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sides]:
    with serving_a_real_model(tmp_path_factory.mktemp("store")) as server:
        models = chat_models(server) or pytest.skip("the server has no chat model")
        default = next(iter(models))
        env = {**SLOW, "OLLAMA_HOST": server.host, "MODELS": default}
        with Endpoint(poll=1) as endpoint, endpoint.worker(env=env) as worker:
            worker.wait_ready(240)
            yield Sides(endpoint, server, models)
        # The worker has told somebody's server to keep it for ever: back to Ollama's default.
        server.post(GENERATE, {"model": default, "keep_alive": "5m"})


# -- the same answer ----------------------------------------------------------------------------


def said(url: str, body: dict[str, Any] | None = None) -> Any:
    """What is answered, without ids and times: an object, or the frames of a stream."""
    answer = requests.request("POST" if body else "GET", url, json=body, timeout=150)
    assert answer.status_code == 200, answer.text
    text = re.sub(r'"(created|created_at|completed_at)": ?\d+', r'"\1":0', answer.text)
    text = re.sub(r'"(chatcmpl|cmpl|call|resp|msg|fc|rs)[-_][\w-]+"', r'"\1"', text)
    return text.split("\n\n") if body and body.get("stream") else json.loads(text)


def assert_same(sides: Sides, route: str, body: dict[str, Any], instead: dict[str, Any]) -> None:
    """The worker answers `body` as Ollama answers it with `instead` in it, where None is left out.

    Ollama may be asked twice: it computes a prompt that is in its cache already in other steps than
    a new one, and those may round differently.
    """
    taken = {name: value for name, value in {**body, **instead}.items() if value is not None}
    own = f"http://{sides.ollama.host}/v1/{route}"
    new, answer = said(own, taken), said(f"{sides.endpoint.openai_url}/{route}", body)
    assert answer == new or answer == said(own, taken)


LIMITS = {"temperature": 0, "seed": 7, "max_tokens": 6, "reasoning_effort": "none"}
RESPONSE_LIMITS = {"temperature": 0, "max_output_tokens": 6, "reasoning": {"effort": "none"}}
HISTORY = [
    {"role": "system", "content": "You answer in one word."},
    {"role": "user", "content": "My name is Ada."},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "What is my name?"},
]
PARTS = [{"type": "text", "text": "Say"}, {"type": "text", "text": "hello"}]
INPUT_PARTS = [{"type": "input_text", "text": "Tell me about whales."}]
SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "name", "schema": SCHEMA}}


def after_a_tool_call(content: str | None, arguments: str) -> list[dict[str, Any]]:
    function = {"name": "end_call", "arguments": arguments}
    call = {"id": "call_1", "type": "function", "function": function}
    result = {"role": "tool", "tool_call_id": "call_1", "content": "done"}
    return [*HELLO, {"role": "assistant", "content": content, "tool_calls": [call]}, result]


AS_VAPI_SENDS = {"messages": after_a_tool_call(None, ""), "tools": [TOOL], "call": {"id": "1"}}
AS_OLLAMA_TAKES = {"messages": after_a_tool_call("", "{}"), "call": None}

# A route, a body, and what Ollama is sent instead for the same answer; None: nothing.
BODIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "system and history": ("chat/completions", {"messages": HISTORY}, {}),
    "stop": ("chat/completions", {"messages": STORY, "stop": [" a", " the"], "max_tokens": 30}, {}),
    "usage": ("chat/completions", {"messages": HELLO, "stream_options": {"include_usage": True}}, {}),
    "logprobs": ("chat/completions", {"messages": HELLO, "logprobs": True, "top_logprobs": 2}, {}),
    "a JSON object": (
        "chat/completions", {"messages": HISTORY, "response_format": {"type": "json_object"}}, {}),
    "a JSON schema": ("chat/completions", {"messages": HISTORY, "response_format": JSON_SCHEMA}, {}),
    "content parts": ("chat/completions", {"messages": [{"role": "user", "content": PARTS}]}, {}),
    "a role of OpenAI's": (
        "chat/completions", {"messages": [{**HISTORY[0], "role": "developer"}, *HELLO]},
        {"messages": [HISTORY[0], *HELLO]}),
    "tools for a model without": (
        "chat/completions", {"messages": HELLO, "tools": [TOOL]}, {"tools": None}),
    "VAPI's turn after a tool call": (
        "chat/completions", AS_VAPI_SENDS, {**AS_OLLAMA_TAKES, "tools": None}),
    "completions": ("completions", {"prompt": "Once upon a time"}, {}),
    "responses": (
        "responses", {"input": [{"role": "user", "content": INPUT_PARTS}], "instructions": "Hi."}, {}),
}  # fmt: skip


@both
@pytest.mark.parametrize("case", BODIES)
def test_an_answer_is_ollamas_own(sides: Sides, case: str, stream: bool) -> None:
    if case == "logprobs" and not REAL_HOST:
        pytest.skip("the tests' own Ollama has none")
    route, body, instead = BODIES[case]
    limits = RESPONSE_LIMITS if route == "responses" else LIMITS
    body = {"model": sides.model(tools=False), **limits, **body, "stream": stream}
    assert_same(sides, route, body, instead)


@pytest.mark.parametrize("route", ["models", "models/MODEL"])
def test_models_are_listed_as_ollama_does(sides: Sides, route: str) -> None:
    assert_same(sides, route.replace("MODEL", next(iter(sides.models))), {}, {})


@both
def test_a_chat_job_says_what_ollama_says(sides: Sides, stream: bool) -> None:
    job = {"messages": HISTORY, "options": {"temperature": 0, "num_predict": 6}, "stream": stream}
    own = {**job, "model": next(iter(sides.models)), "think": False, "stream": False}
    new = sides.ollama.post(CHAT, own).json()
    done = sides.endpoint.wait(sides.endpoint.run(job), 150)
    pieces = [output for _, output in done.chunks]
    text = "".join(piece.get("response", "") for piece in pieces)
    known = [new, sides.ollama.post(CHAT, own).json()]
    assert (text, pieces[-1]["usage"]["total_tokens"]) in [
        (one["message"]["content"], one["prompt_eval_count"] + one["eval_count"]) for one in known
    ]


@pytest.fixture
def model_with_tools(sides: Sides) -> Iterator[str]:
    if REAL_HOST:
        yield sides.model(tools=True)
        return
    model = "qwen2.5:0.5b"
    assert sides.ollama.ollama("pull", model).returncode == 0
    call = {"name": "end_call", "arguments": {}}
    sides.ollama.script(capabilities={model: ["completion", "tools"]}, tool_calls=[call])
    yield model
    sides.ollama.script()


@both
@pytest.mark.parametrize(
    ("body", "instead"),
    [({"messages": HELLO, "tools": [TOOL]}, {}), (AS_VAPI_SENDS, AS_OLLAMA_TAKES)],
    ids=["a question", "VAPI's turn after a tool call"],
)
def test_a_model_with_tools_gets_them(
    sides: Sides, model_with_tools: str, body: dict[str, Any], instead: dict[str, Any], stream: bool
) -> None:
    body = {"model": model_with_tools, **LIMITS, "max_tokens": 30, **body, "stream": stream}
    assert_same(sides, "chat/completions", body, instead)


# -- many at once -------------------------------------------------------------------------------


def test_eight_callers_at_once_hear_their_own_answers(sides: Sides) -> None:
    body = {**LIMITS, "model": next(iter(sides.models)), "stream_options": {"include_usage": True}}

    def prompt_tokens(caller: int) -> int:  # they tell whose answer it is
        words = [{"role": "user", "content": "Say hello" + " and goodbye" * caller}]
        url = f"{sides.endpoint.openai_url}/chat/completions"
        *_, usage, done, end = said(url, {**body, "messages": words, "stream": True})
        assert (done, end) == ("data: [DONE]", "")
        return int(json.loads(usage.removeprefix("data: "))["usage"]["prompt_tokens"])

    with ThreadPoolExecutor(8) as pool:
        tokens = list(pool.map(prompt_tokens, range(8)))
    assert tokens == sorted(set(tokens))


def test_cancelled_jobs_free_their_slots_and_nothing_generates_on(sides: Sides) -> None:
    jobs = [sides.endpoint.run(ENDLESS) for _ in range(8)]  # so that no slot is left
    eventually(lambda: any(sides.endpoint.jobs[job].chunks for job in jobs), 120)
    for job in jobs:
        sides.endpoint.cancel(job)
    if ours := sides.ollama.process:
        runners = psutil.Process(ours.pid).children()
        eventually(lambda: runners and sum(each.cpu_percent(0.3) for each in runners) < 10)
    asked = time.monotonic()
    assert sides.endpoint.runsync(SHORT)["status"] == "COMPLETED"
    assert time.monotonic() - asked < 10, "a slot was still taken"


# -- a server of the worker's own ---------------------------------------------------------------


def test_a_killed_runner_and_a_killed_server_come_back(sides: Sides) -> None:
    if not sides.ollama.process:
        pytest.skip("OLLAMA_TEST_HOST=start: a server to kill")
    started = psutil.Process(sides.ollama.process.pid).environ()
    env = {name: started[name] for name in ("PATH", "OLLAMA_MODELS")}
    env |= {**SLOW, "OLLAMA_NOPRUNE": "1", "MODELS": next(iter(sides.models))}
    with (
        own_host() as host,
        Endpoint(poll=1) as endpoint,
        endpoint.worker(env={**env, "OLLAMA_HOST": host}) as worker,
    ):

        def server() -> psutil.Process:
            children = psutil.Process(worker.pid).children()
            return next(child for child in children if child.cmdline()[-1] == "serve")

        worker.wait_ready(240)
        stream = endpoint.run(ENDLESS)
        eventually(lambda: endpoint.jobs[stream].chunks, 120, worker)
        (runner,) = server().children()
        runner.kill()
        assert endpoint.wait(stream, 120).status == "FAILED"
        assert endpoint.runsync(SHORT, timeout=120)["status"] == "COMPLETED"
        killed = server()
        killed.kill()
        assert endpoint.runsync(SHORT, timeout=120)["status"] == "COMPLETED"
        assert server().pid != killed.pid
        worker.stop()
        eventually(lambda: processes_at(host) == [])
