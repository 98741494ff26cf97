"""The worker in production: a real process under the real SDK's job loop, called as clients call.

Tests marked `live` run against a real endpoint too: its owner sets RUNPOD_ENDPOINT_ID and
RUNPOD_API_KEY and runs `bash tests/run.sh -m live`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests
from conftest import SCRIPTED, Ollama, eventually, free_port, serving
from endpoint import Endpoint, Worker
from openai import APIError, OpenAI

ENDPOINT_ID, API_KEY = os.environ.get("RUNPOD_ENDPOINT_ID"), os.environ.get("RUNPOD_API_KEY")
HI = [{"role": "user", "content": "Say hello."}]
SHORT = {"messages": HI, "max_tokens": 40}  # what a live test costs
CLOCK: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "clock",
        "description": "The time of day in a zone",
        "parameters": {
            "type": "object",
            "properties": {"zone": {"type": "string"}},
            "required": ["zone"],
        },
    },
}
CHAT, RESPONSES = "chat/completions", "responses"
TURNS = {CHAT: "messages", RESPONSES: "input"}  # the field of a body
CLOCKS = {CHAT: CLOCK, RESPONSES: {"type": "function", **CLOCK["function"]}}


class Target:
    """An endpoint as its clients know it: a URL and a key; and, on loopback, what is behind it."""

    def __init__(self, url: str, key: str, local: Loopback | None = None):
        self.url, self.key, self.local = url, key, local
        self.openai: Any = OpenAI(base_url=f"{url}/openai/v1", api_key=key, max_retries=0)
        self.model = "llama3:latest" if local else self.openai.models.list().data[0].id

    def post(self, path: str, body: Any, **how: Any) -> requests.Response:
        headers = {"Authorization": f"Bearer {self.key}"}
        return requests.post(f"{self.url}/{path}", json=body, headers=headers, timeout=120, **how)

    def get(self, path: str) -> Any:
        headers = {"Authorization": f"Bearer {self.key}"}
        return requests.get(f"{self.url}/{path}", headers=headers, timeout=120).json()

    def runsync(self, **fields: Any) -> dict[str, Any]:
        return dict(self.post("runsync", {"input": fields}).json())

    def sse(self, body: dict[str, Any], path: str = "chat/completions") -> list[str]:
        """The frames of a stream, as text; every one of them whole."""
        answer = self.post(f"openai/v1/{path}", {"stream": True, **body})
        assert answer.headers["Content-Type"].startswith("text/event-stream"), answer.text
        assert answer.content.endswith(b"\n\n")
        return [frame for frame in answer.content.decode().split("\n\n") if frame]


class Loopback:
    """An endpoint on loopback, a worker in production mode, and the scripted Ollama that it uses."""

    def __init__(self, endpoint: Endpoint, worker: Worker, ollama: Ollama):
        self.endpoint, self.worker, self.ollama = endpoint, worker, ollama
        self.target = Target(endpoint.url, "any-key", self)

    def script(self, **fields: Any) -> None:
        self.ollama.script(**fields)
        requests.post(f"{self.ollama.url}/test/clear", timeout=5)

    def state(self) -> list[str]:
        return [seen["state"] for seen in self.ollama.requests(*GENERATIONS)]


GENERATIONS = ("/api/chat", "/v1/chat/completions", "/v1/completions", "/v1/responses")


def loopback(**environment: str) -> Iterator[Loopback]:
    with serving(f"127.0.0.1:{free_port()}", **SCRIPTED) as ollama, Endpoint(poll=1) as endpoint:
        env = {"OLLAMA_HOST": ollama.host, "REQUEST_TIMEOUT": "20", **environment}
        with endpoint.worker(env=env) as worker:
            worker.wait_ready()
            yield Loopback(endpoint, worker, ollama)


@pytest.fixture(scope="module")
def loopback_endpoint() -> Iterator[Loopback]:
    yield from loopback()


@pytest.fixture
def local(loopback_endpoint: Loopback) -> Loopback:
    loopback_endpoint.script()
    loopback_endpoint.endpoint.platform.round_trip = 0
    return loopback_endpoint


@pytest.fixture(scope="module")
def live() -> Target | None:
    return Target(f"https://api.runpod.ai/v2/{ENDPOINT_ID}", API_KEY or "") if ENDPOINT_ID else None


@pytest.fixture
def target(live: Target | None, request: pytest.FixtureRequest) -> Target:
    return live or request.getfixturevalue("local").target


@pytest.fixture
def real(worker_environment: dict[str, str]) -> Iterator[Target]:
    """An endpoint whose worker starts Ollama with the small real model."""
    with Endpoint(poll=1) as endpoint, endpoint.worker(env=worker_environment) as worker:
        worker.wait_ready()
        yield Target(endpoint.url, "any-key")


@pytest.fixture(scope="module")
def whole_endpoint() -> Iterator[Loopback]:
    yield from loopback(STREAMING="false")


@pytest.fixture
def whole(whole_endpoint: Loopback) -> Loopback:
    """The endpoint with STREAMING=false."""
    whole_endpoint.script()
    return whole_endpoint


# -- what a client gets -----------------------------------------------------------------------


@pytest.mark.live
def test_the_openai_client_streams_words(target: Target) -> None:
    chunks = list(target.openai.chat.completions.create(model=target.model, stream=True, **SHORT))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks).strip()
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")


@pytest.mark.live
def test_the_openai_client_gets_a_whole_completion(target: Target) -> None:
    done = target.openai.chat.completions.create(model=target.model, **SHORT)
    assert done.object == "chat.completion" and done.choices[0].message.role == "assistant"
    assert done.choices[0].message.content and done.choices[0].finish_reason in ("stop", "length")
    assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens
    assert done.usage.completion_tokens > 0


@pytest.mark.live
def test_the_openai_client_lists_and_finds_models(target: Target) -> None:
    assert target.model in [model.id for model in target.openai.models.list().data]
    assert target.openai.models.retrieve(target.model).id == target.model


@pytest.mark.live
def test_text_completions_stream_and_do_not(target: Target) -> None:
    ask = {"model": target.model, "prompt": "Once upon a time", "max_tokens": 8}
    done = target.openai.completions.create(**ask)
    assert done.object == "text_completion" and done.choices[0].text
    assert done.usage.completion_tokens > 0
    chunks = list(target.openai.completions.create(**ask, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks)


@pytest.mark.parametrize("name", [pytest.param("target", marks=pytest.mark.live), "real"])
def test_responses_stream_and_do_not(name: str, request: pytest.FixtureRequest) -> None:
    target: Target = request.getfixturevalue(name)
    ask = {"model": target.model, "input": "Say hello.", "temperature": 0, "max_output_tokens": 40}
    done = target.openai.responses.create(**ask)
    assert done.status == "completed" and done.output_text.strip()
    assert done.usage.total_tokens == done.usage.input_tokens + done.usage.output_tokens
    *events, last = target.openai.responses.create(**ask, stream=True)
    words = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert len(words) > 1 and "".join(words).strip()
    assert last.type == "response.completed" and last.response.output_text == "".join(words)
    assert 0 < last.response.usage.output_tokens <= 40


@pytest.mark.live
def test_usage_comes_with_a_stream_that_asks_for_it_and_only_then(target: Target) -> None:
    def usages(**how: Any) -> list[Any]:
        frames = target.sse({"model": target.model, **SHORT, **how})
        return [u for frame in frames[:-1] if (u := json.loads(frame[6:]).get("usage"))]

    assert usages() == []
    assert usages(stream_options={"include_usage": True})[0]["completion_tokens"] > 0


@pytest.mark.live
def test_frames_are_what_vapi_hears(target: Target) -> None:
    frames = target.sse({"model": target.model, **SHORT})
    assert frames[-1] == "data: [DONE]"
    for frame in frames[:-1]:
        assert frame.startswith("data: {") and "choices" in json.loads(frame[6:])


CALL = {
    "id": "call-9f2",
    "orgId": "org-1",
    "type": "inboundPhoneCall",
    "status": "in-progress",
    "customer": {"number": "+15550100"},
    "monitor": {
        "listenUrl": "wss://vapi.test/listen/s3cret",
        "controlUrl": "https://vapi.test/control/s3cret",
    },
}
METADATA: dict[str, dict[str, Any]] = {  # VAPI's metadataSendMode
    "off": {},
    "variable": {
        "call": CALL,
        "phoneNumber": {"number": "+15550199"},
        "customer": {"number": "+15550100"},
        "assistant": {"id": "as-1", "name": "Front desk"},
        "metadata": {"account": "A-77"},
        "timestamp": 1795000000000,
    },
    "destructured": {"account": "A-77", "tier": "gold"},
}
AFTER_A_TOOL: list[dict[str, Any]] = [
    {"role": "system", "content": "You are the front desk."},
    {"role": "assistant", "content": "Hello, how can I help?"},
    {"role": "user", "content": "What time is it?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "clock", "arguments": ""}}
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "12:30"},
]


def vapi_body(target: Target, mode: str, messages: list[dict[str, Any]]) -> dict[str, Any]:
    body = {"model": target.model, "messages": messages, "temperature": 0.5, "max_tokens": 40}
    return {**body, "stream": True, **METADATA[mode]}


@pytest.mark.live
@pytest.mark.parametrize("mode", METADATA)
@pytest.mark.parametrize("path", ["chat/completions", "chat/completions/chat/completions"])
def test_vapis_bodies_are_answered_with_a_stream(target: Target, mode: str, path: str) -> None:
    frames = target.sse(vapi_body(target, mode, AFTER_A_TOOL[:3]), path)
    assert frames[-1] == "data: [DONE]"


@pytest.mark.live
def test_a_turn_after_a_tool_is_answered_though_ollama_refuses_it(target: Target) -> None:
    assert target.sse(vapi_body(target, "off", AFTER_A_TOOL))[-1] == "data: [DONE]"


@pytest.mark.live
def test_runsync_on_a_streaming_endpoint_answers_a_list_of_one(target: Target) -> None:
    done = target.runsync(message="Say hello.", options={"num_predict": 40})
    assert done["status"] == "COMPLETED"
    (output,) = done["output"]
    assert output["status"] == "success" and output["response"]


@pytest.mark.live
def test_a_chat_job_that_streams_yields_texts_and_a_last_piece_with_counts(target: Target) -> None:
    job = target.post(
        "run", {"input": {"message": "Say hello.", "stream": True, "options": {"num_predict": 40}}}
    ).json()["id"]
    pieces: list[dict[str, Any]] = []

    def ended() -> bool:
        answer = target.get(f"stream/{job}")
        pieces.extend(part["output"] for part in answer["stream"])
        return bool(answer["status"] == "COMPLETED" and not answer["stream"])

    eventually(ended, 60)
    *texts, last = pieces
    assert "".join(piece["response"] for piece in texts)
    assert all(set(piece) == {"response"} for piece in texts)
    assert last["status"] == "success" and last["model"] and last["timings"]["total_s"] > 0
    assert last["usage"]["completion_tokens"] > 0 and "response" not in last


@pytest.mark.live
@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        (CHAT, {"model": "nope:1b", "messages": HI}, "model 'nope:1b' not found"),
        (CHAT, {"model": "nope:1b", "messages": HI, "stream": True}, "installed: "),
        (CHAT, {"messages": []}, "too short"),
        (CHAT, {"messages": HI, "stream": "yes"}, "true or false"),
        (CHAT, {"messages": HI, "model": "../../etc"}, "name"),
        (CHAT, {"messages": HI, "model": "gpt-oss:120b-cloud"}, "cloud"),
        (CHAT, {"messages": HI, "reasoning_effort": "lots"}, "reasoning"),
        ("embeddings", {"input": "Hi"}, "does not support embeddings"),
        (RESPONSES, {"input": "Hi", "model": "nope:1b"}, "model 'nope:1b' not found"),
        (RESPONSES, {"input": "Hi", "stream": 1}, "true or false"),
        (RESPONSES, {"input": "Hi", "reasoning": {"effort": "lots"}}, "reasoning"),
        (RESPONSES, {"input": [{"type": "x"}], "stream": True}, "input[0]: unknown input item type"),
        ("audio/speech", {"input": "Hi"}, "Unknown route '/v1/audio/speech'"),
    ],
)
def test_an_openai_error_carries_ollamas_own_words(
    target: Target, path: str, body: dict[str, Any], words: str
) -> None:
    done = target.runsync(openai_route=f"/v1/{path}", openai_input=body)
    assert done["status"] == "FAILED"
    assert words in done["error"] and "\n" not in done["error"]


@pytest.mark.live
@pytest.mark.parametrize(
    "route",
    [
        "/api/delete",
        "/v1/../api/pull",
        "/v1/%2e%2e/api/pull",
        "/v1/models/../../api/tags",
        "/v1/models/%2e%2e",
        "http://127.0.0.1:11434/v1/models",
        "/v1/models/",
        "/v1/models?x=1",
        "/v1/chat/completions/",
        "/v1/responses/resp_1",
        "//v1/models",
        "/v1/chät/completions",
        "/v1/models/llamä",
        "",
        7,
        ["/v1/models"],
    ],
)
def test_no_other_route_passes(target: Target, route: Any) -> None:
    done = target.runsync(openai_route=route, openai_input={"model": "llama3"})
    assert done["status"] == "FAILED"
    assert "route" in done["error"] or "name" in done["error"]
    if target.local:
        assert target.local.ollama.requests() == [], "a byte left the worker"


# -- what Ollama gets ---------------------------------------------------------------------------


@pytest.mark.parametrize("mode", METADATA)
def test_vapis_private_fields_stop_at_the_worker(local: Loopback, mode: str) -> None:
    local.target.sse(vapi_body(local.target, mode, HI))
    body = local.ollama.last("/v1/chat/completions")["body"]
    assert set(body) == {"model", "messages", "temperature", "max_tokens", "stream", "reasoning_effort"}


def test_private_fields_of_a_response_stop_at_the_worker(local: Loopback) -> None:
    sent = {"input": HI, "instructions": "Be brief.", "temperature": 0.5, "previous_response_id": "r-1"}
    local.target.sse({**METADATA["variable"], **sent, "store": True, "user": "+15550100"}, RESPONSES)
    body = local.ollama.last("/v1/responses")["body"]
    ours = {"model": "llama3:latest", "stream": True, "max_output_tokens": 1024}
    del sent["previous_response_id"]
    assert body == {**sent, **ours, "reasoning": {"effort": "none"}}


@pytest.mark.parametrize(
    ("path", "sent", "received"),
    [
        (CHAT, {}, {"model": "llama3:latest", "max_tokens": 1024, "reasoning_effort": "none"}),
        (CHAT, {"model": "", "max_tokens": 0}, {"model": "llama3:latest", "max_tokens": 1024}),
        (CHAT, {"max_tokens": -1}, {"max_tokens": 1024}),
        (CHAT, {"max_tokens": 5}, {"max_tokens": 5}),
        (CHAT, {"max_completion_tokens": 6}, {"max_tokens": 6}),
        (CHAT, {"reasoning_effort": "low"}, {"reasoning_effort": "low"}),
        (
            CHAT,
            {"model": "qwen2.5:7b", "temperature": 0, "seed": 1},
            {"model": "qwen2.5:7b", "temperature": 0},
        ),
        (RESPONSES, {}, {"max_output_tokens": 1024, "reasoning": {"effort": "none"}}),
        (RESPONSES, {"max_output_tokens": 0}, {"max_output_tokens": 1024}),
        (RESPONSES, {"max_output_tokens": -1}, {"max_output_tokens": 1024}),
        (RESPONSES, {"max_output_tokens": 5}, {"max_output_tokens": 5}),
        (RESPONSES, {"reasoning": {"effort": "low"}}, {"reasoning": {"effort": "low"}}),
        (
            RESPONSES,
            {"reasoning": {"summary": "auto"}},
            {"reasoning": {"effort": "none", "summary": "auto"}},
        ),
        (RESPONSES, {"text": {"format": {"type": "text"}}}, {"text": {"format": {"type": "text"}}}),
        (RESPONSES, {"model": "qwen2.5:7b", "top_p": 0.5}, {"model": "qwen2.5:7b", "top_p": 0.5}),
    ],
)
def test_defaults_fill_what_a_body_leaves_out(
    local: Loopback, path: str, sent: dict[str, Any], received: dict[str, Any]
) -> None:
    local.script(capabilities={"llama3:latest": ["completion", "thinking"]})
    local.target.sse({TURNS[path]: HI, **sent}, path)
    assert received.items() <= local.ollama.last(f"/v1/{path}")["body"].items()


@pytest.mark.parametrize("path", TURNS)
def test_the_role_developer_is_system_and_tool_choice_none_drops_the_tools(
    local: Loopback, path: str
) -> None:
    local.script(capabilities={"qwen2.5:7b": ["completion", "tools"]})
    rule = {"role": "developer", "content": "Rhyme."}
    body = {"model": "qwen2.5:7b", TURNS[path]: [rule, *HI], "tools": [CLOCKS[path]]}
    local.target.sse({**body, "tool_choice": "auto"}, path)
    asked = local.ollama.last(f"/v1/{path}")["body"]
    assert asked[TURNS[path]][0] == {"role": "system", "content": "Rhyme."}
    assert asked["tools"] == body["tools"]
    local.target.sse({**body, "tool_choice": "none"}, path)
    assert "tools" not in local.ollama.last(f"/v1/{path}")["body"]


def test_items_of_a_response_pass_and_the_developer_among_them_is_system(local: Loopback) -> None:
    items: list[dict[str, Any]] = [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Rhyme."}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "Let me see."},
        {"type": "function_call", "call_id": "call_1", "name": "clock", "arguments": ""},
        {"type": "function_call_output", "call_id": "call_1", "output": "12:30"},
    ]
    local.target.sse({"input": items}, RESPONSES)
    received = local.ollama.last("/v1/responses")["body"]["input"]
    assert received == [{**items[0], "role": "system"}, *items[1:]]


def test_turns_that_ollama_refuses_are_mended(local: Loopback) -> None:
    local.target.sse({"messages": [*AFTER_A_TOOL, {"role": "user", "content": None}]})
    turns = local.ollama.last("/v1/chat/completions")["body"]["messages"]
    assert turns[3]["content"] == "" and turns[-1]["content"] == ""
    assert turns[3]["tool_calls"][0]["function"]["arguments"] == "{}"
    assert turns[:3] == AFTER_A_TOOL[:3] and turns[4] == AFTER_A_TOOL[4]


def test_tools_are_dropped_for_a_model_without_them_with_one_warning(local: Loopback) -> None:
    local.script(capabilities={"qwen2.5:7b": ["completion", "tools"]})
    for path in (CHAT, RESPONSES, CHAT):
        local.target.sse({TURNS[path]: HI, "tools": [CLOCKS[path]]}, path)
        assert "tools" not in local.ollama.last(f"/v1/{path}")["body"]
    warnings = re.findall(r"warning: .*tools.*", local.worker.log)
    assert len(warnings) == 1 and "llama3:latest takes no tools" in warnings[0]


@pytest.mark.parametrize("stream", [True, False])
def test_tool_calls_reach_the_openai_client(local: Loopback, stream: bool) -> None:
    arguments = {"zone": "UTC"}
    script = {"tokens": [], "tool_calls": [{"name": "clock", "arguments": arguments}]}
    local.script(**script, capabilities={"qwen2.5:7b": ["completion", "tools"]})
    done = local.target.openai.chat.completions.create(
        model="qwen2.5:7b", messages=HI, tools=[CLOCK], stream=stream
    )
    if stream:
        chunks = list(done)
        calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
        assert chunks[-1].choices[0].finish_reason == "tool_calls"
    else:
        calls = done.choices[0].message.tool_calls
        assert done.choices[0].finish_reason == "tool_calls"
    (call,) = calls
    assert call.type == "function" and call.id and call.function.name == "clock"
    assert json.loads(call.function.arguments) == arguments


@pytest.mark.parametrize("stream", [True, False])
def test_function_calls_of_a_response_reach_the_openai_client(local: Loopback, stream: bool) -> None:
    arguments = {"zone": "UTC"}
    script = {"tokens": [], "tool_calls": [{"name": "clock", "arguments": arguments}]}
    local.script(**script, capabilities={"qwen2.5:7b": ["completion", "tools"]})
    done = local.target.openai.responses.create(
        model="qwen2.5:7b", input="Hi", tools=[CLOCKS[RESPONSES]], stream=stream
    )
    (call,) = (list(done)[-1].response if stream else done).output
    assert call.type == "function_call" and call.call_id and call.name == "clock"
    assert json.loads(call.arguments) == arguments


def test_thinking_that_was_asked_for_reaches_the_client(local: Loopback) -> None:
    local.script(thinking="Let me see.", capabilities={"llama3:latest": ["completion", "thinking"]})
    body = {"model": "llama3:latest", "messages": HI, "reasoning_effort": "low"}
    answer = local.target.post("openai/v1/chat/completions", body).json()
    assert answer["choices"][0]["message"]["reasoning"] == "Let me see."


@pytest.mark.parametrize("more", [{}, {"stream": True}])
def test_embeddings_pass_and_never_stream(local: Loopback, more: dict[str, bool]) -> None:
    local.script(embeddings=True)
    done = local.target.openai.embeddings.create(
        model="llama3:latest", input="Hi", encoding_format="float", extra_body=more
    )
    assert done.data[0].embedding


# -- streams ------------------------------------------------------------------------------------


def word(frame: str) -> str:
    """What a frame says, of a completion or a response."""
    chunk = json.loads(frame.partition("data: ")[2])
    if "choices" in chunk:
        return str(chunk["choices"][0]["delta"].get("content", ""))
    return str(chunk["delta"]) if chunk["type"] == "response.output_text.delta" else ""


@pytest.mark.parametrize(
    ("path", "form"),
    [(CHAT, "data: .+"), (RESPONSES, r'event: (\S+)\ndata: .*"type":"\1".*')],
    ids=TURNS,
)
def test_frames_that_come_during_a_post_leave_together_and_whole(
    local: Loopback, path: str, form: str
) -> None:
    words = ["Grüße ", "日本 ", "🎈 ", "data: "] * 45
    local.script(tokens=words, interval_ms=3)
    local.endpoint.platform.round_trip = 0.05
    frames = local.target.sse({TURNS[path]: HI}, path)
    assert "".join(word(frame) for frame in frames if frame != "data: [DONE]") == "".join(words)
    (job,) = [job for job in local.endpoint.jobs.values() if job.status == "COMPLETED"][-1:]
    assert 1 < len(job.chunks) < 60
    for _, chunk in job.chunks:
        *whole, rest = chunk.split("\n\n")
        assert all(re.fullmatch(form, frame) for frame in whole) and rest == ""


@pytest.mark.parametrize("chat", [True, False])
def test_a_chunk_never_exceeds_512_kb(local: Loopback, chat: bool) -> None:
    local.script(tokens=['"ä' * 20_000] * 30)
    local.endpoint.platform.round_trip = 0.2
    route = {"openai_route": "/v1/chat/completions", "openai_input": {"messages": HI, "stream": True}}
    job = local.endpoint.wait(local.endpoint.run({"message": "Hi", "stream": True} if chat else route))
    assert job.status == "COMPLETED"
    sizes = [len(post) for post in job.posts[:-1]]
    assert max(sizes) <= 512 * 1024 + 100 and len(sizes) < 30


def test_the_first_frame_leaves_before_the_last_token_comes(local: Loopback) -> None:
    local.script(tokens=["one ", "two"], hang_after=1)
    with local.target.openai.chat.completions.create(
        model="llama3:latest", messages=HI, stream=True
    ) as stream:
        assert next(iter(stream)).choices[0].delta.content == "one "
    eventually(lambda: local.state() == ["closed"])


@pytest.mark.parametrize("fields", [{"cut_after": 3}, {"drop_after": 3}])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", TURNS)
def test_a_stream_that_is_cut_fails_the_job_and_never_completes_it(
    local: Loopback, fields: dict[str, Any], stream: bool, path: str
) -> None:
    local.script(**fields)
    body = {TURNS[path]: HI, "stream": stream}
    done = local.target.runsync(openai_route=f"/v1/{path}", openai_input=body)
    assert done["status"] == "FAILED"
    assert re.search("broke|unexpected EOF", done["error"])
    local.script()
    assert local.target.runsync(message="Hi")["status"] == "COMPLETED"


# -- cancels ------------------------------------------------------------------------------------

ENDLESS: dict[str, Any] = {"messages": HI, "max_tokens": 100_000}
JOBS = {
    "an OpenAI stream": {
        "openai_route": "/v1/chat/completions",
        "openai_input": {**ENDLESS, "stream": True},
    },
    "a completion": {"openai_route": "/v1/chat/completions", "openai_input": ENDLESS},
    "a response that streams": {
        "openai_route": "/v1/responses",
        "openai_input": {"input": "Hi", "max_output_tokens": 100_000, "stream": True},
    },
    "a chat": {"message": "Hi", "options": {"num_predict": 100_000}},
    "a chat that streams": {"message": "Hi", "stream": True, "options": {"num_predict": 100_000}},
}


@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)
@pytest.mark.parametrize("first_ms", [0, 60_000])
def test_a_cancelled_job_stops_its_generation(
    local: Loopback, job: dict[str, Any], first_ms: int
) -> None:
    local.script(repeat=-1, interval_ms=20, first_ms=first_ms)
    job_id = local.endpoint.run(job)
    eventually(lambda: local.state() == ["running"])
    local.endpoint.cancel(job_id)
    eventually(lambda: local.state() == ["closed"])
    assert local.endpoint.wait(job_id).status == "CANCELLED"


def test_a_job_that_runs_into_its_policy_stops_its_generation(local: Loopback) -> None:
    local.script(repeat=-1, interval_ms=20)
    job = local.endpoint.wait(local.endpoint.run(JOBS["a chat"], policy={"executionTimeout": 300}))
    assert job.status == "TIMED_OUT"
    eventually(lambda: local.state() == ["closed"])


def test_a_client_that_hangs_up_stops_its_generation(local: Loopback) -> None:
    local.script(repeat=-1, interval_ms=20)
    with local.target.post(
        "openai/v1/chat/completions", {**ENDLESS, "stream": True}, stream=True
    ) as answer:
        next(answer.iter_content(None))
    eventually(lambda: local.state() == ["closed"])


def test_with_streaming_off_a_cancelled_job_stops_its_generation(whole: Loopback) -> None:
    whole.script(repeat=-1, interval_ms=20)
    job_id = whole.endpoint.run(JOBS["a chat"])
    eventually(lambda: whole.state() == ["running"])
    whole.endpoint.cancel(job_id)
    eventually(lambda: whole.state() == ["closed"])


# -- side by side -------------------------------------------------------------------------------


def test_a_burst_starts_at_once_up_to_max_concurrency_and_the_next_when_a_place_is_free(
    local: Loopback,
) -> None:
    local.target.runsync(message="Hi", options={"num_predict": 1})  # the next poll asks for all places
    local.script(repeat=-1, interval_ms=50)
    nine = [{"id": f"burst-{place}", "input": JOBS["an OpenAI stream"]} for place in range(9)]
    jobs = local.endpoint.offer(nine)
    eventually(lambda: local.state() == ["running"] * 8)
    starts = [seen["started"] for seen in local.ollama.requests(*GENERATIONS)]
    assert max(starts) - min(starts) < 0.8, "one waited for the SDK's pause of 1 s"
    waiting = [job for job in jobs if local.endpoint.status(job)["status"] == "IN_QUEUE"]
    assert len(waiting) == 1
    local.endpoint.cancel(next(job for job in jobs if job not in waiting))
    eventually(lambda: sorted(local.state()) == ["closed", *["running"] * 8])
    for job in jobs:
        local.endpoint.cancel(job)
    eventually(lambda: local.state() == ["closed"] * 9)


@pytest.mark.parametrize("name", ["local", "whole"])
def test_eight_jobs_run_side_by_side(name: str, request: pytest.FixtureRequest) -> None:
    there: Loopback = request.getfixturevalue(name)
    there.script(repeat=20, first_ms=1500)
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(there.target.runsync, message="Hi") for _ in range(8)]
        eventually(lambda: there.state() == ["running"] * 8)
        assert {done.result()["status"] for done in asked} == {"COMPLETED"}


def test_a_hung_job_holds_up_no_other(local: Loopback) -> None:
    local.script(hang_after=0, times=1)
    hung = local.endpoint.run({"message": "Hi"})
    eventually(lambda: local.state() == ["running"])
    assert local.target.runsync(message="Hi")["status"] == "COMPLETED"
    local.endpoint.cancel(hung)


def test_every_job_gets_exactly_one_answer(local: Loopback) -> None:
    local.script(repeat=10, interval_ms=5)
    inputs = [
        {"message": "Hi"},
        {"type": "sing"},
        JOBS["a completion"],
        {"message": "Hi", "stream": True},
    ] * 5
    jobs = [local.endpoint.wait(job) for job in [local.endpoint.run(each) for each in inputs]]
    assert [job.answers for job in jobs] == [1] * 20
    assert [job.status for job in jobs] == ["COMPLETED", "FAILED", "COMPLETED", "COMPLETED"] * 5
    assert not any(job.late for job in jobs)


def test_a_job_without_an_input_is_answered_too(local: Loopback) -> None:
    local.target.runsync(message="Hi")  # the next poll asks for a batch: only there the SDK lets them in
    jobs = local.endpoint.offer([{"id": "bare-1"}, {"id": "bare-2", "input": None}])
    for job in jobs:
        done = local.endpoint.wait(job)
        assert done.status == "FAILED" and 'needs an "input"' in done.error


# -- with STREAMING=false -----------------------------------------------------------------------


def test_with_streaming_off_runsync_answers_the_object_itself(whole: Loopback) -> None:
    output = whole.target.runsync(message="Hi")["output"]
    assert output["status"] == "success" and output["response"]


def test_with_streaming_off_a_completion_still_comes_whole(whole: Loopback) -> None:
    done = whole.target.openai.chat.completions.create(model="llama3:latest", messages=HI)
    assert done.choices[0].message.content


@pytest.mark.parametrize("job", [job for name, job in JOBS.items() if "stream" in name])
def test_with_streaming_off_a_stream_is_an_error_that_names_the_setting(
    whole: Loopback, job: dict[str, Any]
) -> None:
    done = whole.target.runsync(**job)
    assert done["status"] == "FAILED" and "STREAMING=true" in done["error"]
    with pytest.raises(APIError, match="STREAMING"):
        whole.target.openai.chat.completions.create(model="llama3:latest", messages=HI, stream=True)


# -- privacy ------------------------------------------------------------------------------------


def test_the_log_holds_one_line_a_job_and_no_content(local: Loopback) -> None:
    local.script(tokens=["whispered", "reply"])
    before = len(local.worker.log)
    secret = "zebra crossing"
    said = [{"role": "user", "content": secret}]
    job = local.endpoint.wait(local.endpoint.run({"messages": said, "system": secret}))
    local.target.sse({**vapi_body(local.target, "variable", said), "metadata": {"note": secret}})
    local.target.runsync(type=secret)
    local.target.runsync(openai_route=f"/{secret}")
    local.target.runsync(message="Hi", model="zebra-crossing")
    local.target.runsync(message="Hi", options={"num_ctx": secret})
    log = local.worker.log[before:]
    line = rf"{job.id} \| kind=chat model=llama3:latest status=success seconds=\d+\.\d\d tokens=2\n"
    assert re.search(line, log)
    line = r"kind=openai model=llama3:latest status=success seconds=.* tokens=2 first_token_ms=\d+ "
    assert re.search(line, log)
    assert log.count("kind=") == 6
    for private in ("zebra", "whispered", "reply", "+1555", "s3cret"):
        assert private not in log


def test_the_log_tells_the_tokens_of_a_response_and_nothing_of_it(local: Loopback) -> None:
    local.script(tokens=["whispered", "reply"])
    before = len(local.worker.log)
    body = {"input": "zebra", "instructions": "zebra", "call": CALL}
    local.target.sse(body, RESPONSES)
    local.target.post("openai/v1/responses", body)
    log = local.worker.log[before:]
    streamed, whole = re.findall(r"kind=openai model=llama3:latest status=success .*", log)
    assert " tokens=2 first_token_ms=" in streamed and whole.endswith(" tokens=2")
    assert not re.search("zebra|whispered|reply|s3cret", log)


def test_threads_of_ended_jobs_are_gone(local: Loopback) -> None:
    for _ in range(3):
        local.target.runsync(message="Hi")
    count = eventually(lambda: len(os.listdir(f"/proc/{local.worker.pid}/task")))
    for _ in range(20):
        local.target.runsync(message="Hi")
    eventually(lambda: len(os.listdir(f"/proc/{local.worker.pid}/task")) <= count)
