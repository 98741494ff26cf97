"""The wire format of Ollama 0.32.15, row by row, as the tests' own Ollama must have it.

    pytest tests/test_ollama_api.py
    OLLAMA_TEST_HOST=127.0.0.1:11434 pytest tests/test_ollama_api.py    against a real server
    OLLAMA_TEST_HOST=start pytest tests/test_ollama_api.py              the same, started on a free port

There it asks the model that can do least beside chatting, of these the smallest; OLLAMA_TEST_MODEL
names another. What needs a script or the death of a process is skipped.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from conftest import eventually, free_port

OLLAMA = Path(__file__).parent / "ollama"
REAL_HOST = os.environ.get("OLLAMA_TEST_HOST")
CHAT, V1 = "/api/chat", "/v1/chat/completions"
GENERATE, COMPLETIONS, RESPONSES = "/api/generate", "/v1/completions", "/v1/responses"
HELLO = [{"role": "user", "content": "Hello"}]
STORY = [{"role": "user", "content": "Tell me a very long story about a whale and a mountain."}]
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "end_call", "parameters": {"type": "object", "properties": {}}},
}

stand_in_only = pytest.mark.skipif(
    bool(REAL_HOST), reason="needs the stand-in: a script, or a process to kill"
)


# ---------------------------------------------------------------------------------------------
# Servers
# ---------------------------------------------------------------------------------------------


class Server:
    def __init__(self, host: str, process: subprocess.Popen[bytes] | None = None) -> None:
        self.host = host
        self.process = process

    def get(self, path: str) -> requests.Response:
        return requests.get(f"http://{self.host}{path}", timeout=120)

    def post(self, path: str, body: Any, stream: bool = False) -> requests.Response:
        data = body if isinstance(body, str) else json.dumps(body)
        return requests.post(f"http://{self.host}{path}", data=data, stream=stream, timeout=120)

    def ollama(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "OLLAMA_HOST": self.host}
        return subprocess.run(
            [sys.executable, OLLAMA, *arguments], env=env, capture_output=True, text=True
        )

    def script(self, **fields: Any) -> None:
        self.post("/test/script", fields).raise_for_status()

    def state(self) -> Any:
        return self.get("/test/state").json()

    def last(self) -> Any:
        return self.get("/test/requests").json()[-1]

    def in_background(self, path: str, body: Any) -> Callable[[], requests.Response]:
        """Posts in a thread; the result waits for the answer."""
        answers: list[requests.Response] = []
        thread = threading.Thread(target=lambda: answers.append(self.post(path, body)))
        thread.start()

        def answer() -> requests.Response:
            thread.join(120)
            return answers[0]

        return answer


@contextlib.contextmanager
def serving(**environment: str) -> Iterator[Server]:
    """An `ollama serve` of our own, with nothing of Ollama's in its environment but this."""
    host = f"127.0.0.1:{free_port()}"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("OLLAMA_")}
    env = {**clean, **environment, "OLLAMA_HOST": host}
    process = subprocess.Popen(["ollama", "serve"], env=env, stderr=subprocess.PIPE)
    server = Server(host, process)
    assert process.stderr
    try:
        for line in process.stderr:
            if b"Listening" in line:
                break
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield server
    finally:
        process.terminate()
        process.wait(10)


def real_ollama() -> dict[str, str]:
    """The environment as conftest.py found it: with the user's own `ollama` and models."""
    user = psutil.Process().environ()
    folders = user["PATH"].split(os.pathsep)
    path = os.pathsep.join(folder for folder in folders if Path(folder).resolve() != OLLAMA.parent)
    models = user.get("OLLAMA_MODELS", "")
    # No pruning: the user may be pulling a model at this moment.
    return {"PATH": path, "OLLAMA_MODELS": models, "OLLAMA_NOPRUNE": "1"}


@contextlib.contextmanager
def serving_a_real_model(store: Path) -> Iterator[Server]:
    """The server that OLLAMA_TEST_HOST means; else the stand-in, with its model in `store`."""
    if REAL_HOST and REAL_HOST != "start":
        yield Server(REAL_HOST)
    elif REAL_HOST:
        with serving(**real_ollama()) as server:
            yield server
    else:
        with serving(OLLAMA_MODELS=str(store), OLLAMA_NO_CLOUD="1", OLLAMA_NUM_PARALLEL="2") as server:
            pulled = server.ollama("pull", "smollm2")
            assert pulled.returncode == 0, pulled.stderr
            yield server


def chat_models(server: Server) -> dict[str, list[str]]:
    """The server's chat models with their capabilities: the least able first, of these the smallest."""
    listed = sorted(server.get("/api/tags").json()["models"], key=lambda model: model["size"])
    names = [model["name"] for model in listed if not model.get("remote_host")]  # none of the cloud's
    if wanted := os.environ.get("OLLAMA_TEST_MODEL"):
        names = [wanted]
    shown = {name: server.post("/api/show", {"model": name}).json()["capabilities"] for name in names}
    chat = [(name, can) for name, can in shown.items() if "completion" in can]
    return dict(sorted(chat, key=lambda model: len(model[1])))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving_a_real_model(tmp_path_factory.mktemp("store")) as server:
        yield server


@pytest.fixture(scope="module")
def models(server: Server) -> dict[str, list[str]]:
    return chat_models(server) or pytest.skip("the server has no chat model")


@pytest.fixture(scope="module")
def model(models: dict[str, list[str]]) -> str:
    return next(iter(models))


@pytest.fixture(scope="module")
def scripted_server() -> Iterator[Server]:
    if REAL_HOST:
        pytest.skip("needs the stand-in")
    with serving(OLLAMA_SCRIPT='{"models": ["m"]}', OLLAMA_NUM_PARALLEL="8") as server:
        yield server


@pytest.fixture
def scripted(scripted_server: Server) -> Server:
    scripted_server.script()
    return scripted_server


def frames(response: requests.Response) -> list[Any]:
    """The events of an SSE answer, `[DONE]` as that string."""
    *events, rest = response.text.split("\n\n")
    assert rest == "" and all(event.startswith("data: ") for event in events), response.text
    return [event[6:] if event == "data: [DONE]" else json.loads(event[6:]) for event in events]


def events(response: requests.Response) -> list[Any]:
    """The events of a Responses stream: each says its name twice, and its number."""
    *named, rest = response.text.split("\n\n")
    pairs = [event.split("\n") for event in named]
    told = [json.loads(data.removeprefix("data: ")) for _, data in pairs]
    assert [name for name, _ in pairs] == [f"event: {event['type']}" for event in told] and rest == ""
    assert [event["sequence_number"] for event in told] == list(range(len(told)))
    return told


def lines(response: requests.Response) -> list[Any]:
    return [json.loads(line) for line in response.text.splitlines()]


def fill(value: Any, model: str) -> Any:
    return json.loads(json.dumps(value).replace("MODEL", model))


# ---------------------------------------------------------------------------------------------
# Answers of the real model
# ---------------------------------------------------------------------------------------------

METRICS = ["total_duration", "load_duration", "prompt_eval_count", "prompt_eval_duration", "eval_count"]
METRICS += ["eval_duration"]


def test_chat_answers_one_object_with_counts(server: Server, model: str) -> None:
    options = {"temperature": 0, "stop": ["!", ".", "?"]}
    response = server.post(
        CHAT, {"model": model, "messages": HELLO, "stream": False, "options": options}
    )
    answer = response.json()
    assert response.headers["content-type"] == "application/json; charset=utf-8"
    assert list(answer) == ["model", "created_at", "message", "done", "done_reason", *METRICS]
    assert answer["model"] == model and answer["done"] is True and answer["done_reason"] == "stop"
    assert answer["message"]["role"] == "assistant" and answer["message"]["content"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", answer["created_at"])
    assert all(isinstance(answer[name], int) and answer[name] > 0 for name in METRICS)


def test_chat_streams_a_line_per_token(server: Server, model: str) -> None:
    body = {"model": model, "messages": STORY, "options": {"temperature": 0, "num_predict": 5}}
    response = server.post(CHAT, body)
    *tokens, last = lines(response)
    assert response.headers["content-type"] == "application/x-ndjson"
    assert response.headers["transfer-encoding"] == "chunked"
    for token in tokens:
        assert list(token) == ["model", "created_at", "message", "done"] and token["done"] is False
        assert list(token["message"]) == ["role", "content"] and token["message"]["role"] == "assistant"
    assert (last["done"], last["done_reason"], last["message"]["content"]) == (True, "length", "")
    assert last["eval_count"] == 5 and last["prompt_eval_count"] > 10


def test_v1_chat_answers_one_object_with_usage(server: Server, model: str) -> None:
    body = {"model": model, "messages": HELLO, "temperature": 0, "stop": ["!", ".", "?"]}
    response = server.post(V1, body)
    answer = response.json()
    assert response.headers["content-type"] == "application/json"
    assert list(answer) == ["id", "object", "created", "model", "system_fingerprint", "choices", "usage"]
    assert re.fullmatch(r"chatcmpl-\d{1,3}", answer["id"]) and answer["object"] == "chat.completion"
    assert answer["model"] == model and answer["system_fingerprint"] == "fp_ollama"
    [choice] = answer["choices"]
    assert list(choice) == ["index", "message", "finish_reason"] and choice["finish_reason"] == "stop"
    assert choice["message"]["role"] == "assistant" and choice["message"]["content"]
    usage = answer["usage"]
    assert usage["prompt_tokens"] + usage["completion_tokens"] == usage["total_tokens"] > 10


def test_the_role_developer_vanishes_in_the_template(server: Server, model: str) -> None:
    def prompt_tokens(*roles: str) -> int:
        told = [{"role": role, "content": "Answer in rhymes, in Latin."} for role in roles]
        body = {"model": model, "messages": [*told, *HELLO], "max_tokens": 1}
        return int(server.post(V1, body).json()["usage"]["prompt_tokens"])

    assert prompt_tokens("developer") == prompt_tokens() != prompt_tokens("system")


@pytest.mark.parametrize("asked", [False, True], ids=["plain", "include_usage"])
def test_v1_chat_streams_events_to_done(server: Server, model: str, asked: bool) -> None:
    body = {"model": model, "messages": STORY, "temperature": 0, "max_tokens": 4, "stream": True}
    response = server.post(
        V1, {**body, **({"stream_options": {"include_usage": True}} if asked else {})}
    )
    *chunks, done = frames(response)
    assert response.headers["content-type"] == "text/event-stream" and done == "[DONE]"
    usage = chunks.pop() if asked else None
    *tokens, last = chunks
    for chunk in [*chunks, *([usage] if usage else [])]:
        assert chunk["object"] == "chat.completion.chunk" and chunk["model"] == model
        assert (chunk["id"], chunk["created"]) == (last["id"], last["created"])
    assert tokens[0]["choices"][0]["delta"]["role"] == "assistant"
    assert all(list(token["choices"][0]["delta"]) == ["content"] for token in tokens[1:])
    assert all(token["choices"][0]["finish_reason"] is None for token in tokens)
    assert last["choices"] == [{"index": 0, "delta": {}, "finish_reason": "length"}]
    if usage:
        assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 4
        assert usage["usage"]["total_tokens"] == usage["usage"]["prompt_tokens"] + 4


def test_v1_completions_answers_and_streams_text(server: Server, model: str) -> None:
    body = {"model": model, "prompt": "Tell me a long story", "temperature": 0, "max_tokens": 4}
    answer = server.post(COMPLETIONS, body).json()
    assert answer["object"] == "text_completion" and answer["usage"]["completion_tokens"] == 4
    assert list(answer["choices"][0]) == ["text", "index", "finish_reason"]
    *chunks, done = frames(server.post(COMPLETIONS, {**body, "stream": True}))
    assert done == "[DONE]" and chunks[-1]["choices"] == [
        {"text": "", "index": 0, "finish_reason": "length"}
    ]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks)
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks[:-1])


# Its fields, but for those that repeat the request's.
RESPONSE = """id object created_at completed_at status incomplete_details model previous_response_id
output error tool_choice parallel_tool_calls presence_penalty frequency_penalty top_logprobs usage
max_tool_calls store service_tier metadata safety_identifier prompt_cache_key""".split()
REPEATED: dict[str, Any] = {"instructions": None, "truncation": "disabled", "tools": [], "top_p": 1}
REPEATED |= {"temperature": 1, "reasoning": None, "max_output_tokens": None, "background": False}
REPEATED |= {"text": {"format": {"type": "text"}}}


def test_v1_responses_answers_an_object_with_a_message(server: Server, model: str) -> None:
    sent = {"temperature": 0, "max_output_tokens": 5, "instructions": "Tell it long."}
    response = server.post(RESPONSES, {"model": model, "input": "Tell me of a whale.", **sent})
    answer = response.json()
    assert response.headers["content-type"] == "application/json"
    assert set(answer) == {*RESPONSE, *REPEATED}
    assert {name: answer[name] for name in REPEATED} == {**REPEATED, **sent}
    assert re.fullmatch(r"resp_\d{1,6}", answer["id"]) and answer["object"] == "response"
    assert (answer["model"], answer["status"]) == (model, "completed")  # and not incomplete
    assert answer["created_at"] <= answer["completed_at"]
    [message] = answer["output"]
    assert list(message) == ["id", "type", "status", "role", "content"]
    assert (message["type"], message["status"], message["role"]) == ("message", "completed", "assistant")
    [part] = message["content"]
    assert part == {"type": "output_text", "text": part["text"], "annotations": [], "logprobs": []}
    usage = answer["usage"]
    assert part["text"] and usage["output_tokens"] == 5 < usage["input_tokens"]
    assert usage["total_tokens"] == usage["input_tokens"] + 5
    assert usage["input_tokens_details"] == {"cached_tokens": 0}
    assert usage["output_tokens_details"] == {"reasoning_tokens": 0}


def test_v1_responses_streams_named_events(server: Server, model: str) -> None:
    sent = {"temperature": 0, "max_output_tokens": 4, "stream": True}
    response = server.post(RESPONSES, {"model": model, "input": "Tell me a long story.", **sent})
    assert response.headers["content-type"] == "text/event-stream"
    told = events(response)
    created, started, added, opened, *deltas, text, part, item, completed = told
    assert [event["type"].removeprefix("response.") for event in told if event not in deltas] == [
        "created", "in_progress", "output_item.added", "content_part.added",
        "output_text.done", "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    assert {event["type"] for event in deltas} == {"response.output_text.delta"}
    for begun in (created["response"], started["response"]):
        assert set(begun) == {*RESPONSE, *REPEATED} and begun["usage"] is None
        assert (begun["status"], begun["output"]) == ("in_progress", [])
    said, message = "".join(event["delta"] for event in deltas), item["item"]
    assert said == text["text"] == part["part"]["text"] == message["content"][0]["text"] != ""
    assert added["item"] == {**message, "status": "in_progress", "content": []}
    for event in [opened, *deltas, text, part]:
        place = (event["item_id"], event["output_index"], event["content_index"])
        assert place == (message["id"], 0, 0)
    done = completed["response"]
    assert done["id"] == created["response"]["id"] and done["usage"]["output_tokens"] == 4
    assert (done["status"], done["output"]) == ("completed", [message])


TALE = "Tell me of a whale."
SAME: dict[str, list[dict[str, Any]]] = {
    "a text is a message of the user": [
        {"input": TALE},
        {"input": [{"role": "user", "content": TALE}]},
        {"input": [{"type": "message", "role": "user", "content": [
            {"type": "input_text", "text": "Tell me "},
            {"type": "output_text", "text": "of a whale."}]}]},
    ],
    "instructions are a message of the system": [
        {"input": TALE, "instructions": "Rhyme."},
        {"input": [{"role": "system", "content": "Rhyme."}, {"role": "user", "content": TALE}]},
    ],
    "null is an empty text": [
        {"input": [{"role": "user", "content": TALE}, {"role": "assistant", "content": None}]},
        {"input": [{"role": "user", "content": TALE}, {"role": "assistant", "content": ""}]},
    ],
    "what was thought is no message": [
        {"input": TALE},
        {"input": [{"type": "reasoning", "encrypted_content": "hm", "summary": []},
                   {"role": "user", "content": TALE}]},
    ],
}  # fmt: skip


@pytest.mark.parametrize("case", SAME)
def test_v1_responses_takes_an_input_in_several_forms(server: Server, model: str, case: str) -> None:
    how = {"model": model, "max_output_tokens": 1}
    usages = [server.post(RESPONSES, {**how, **form}).json()["usage"] for form in SAME[case]]
    assert len({usage["input_tokens"] for usage in usages}) == 1


def test_v1_responses_keeps_to_a_json_schema(server: Server, model: str) -> None:
    schema = {"type": "object", "properties": {"sea": {"enum": ["blue"]}}, "required": ["sea"]}
    wanted = {"type": "json_schema", "name": "sea", "schema": {**schema, "additionalProperties": False}}
    body = {"model": model, "input": "Which colour is the sea?", "max_output_tokens": 100}
    answer = server.post(RESPONSES, {**body, "text": {"format": wanted}}).json()
    assert json.loads(answer["output"][0]["content"][0]["text"]) == {"sea": "blue"}
    assert answer["text"] == {"format": wanted}


@pytest.mark.parametrize("nothing", [{}, {"input": ""}, {"input": None}, {"input": []}])
def test_v1_responses_without_input_loads(server: Server, model: str, nothing: dict[str, Any]) -> None:
    answer = server.post(RESPONSES, {"model": model, **nothing}).json()
    assert answer["usage"]["total_tokens"] == 0 and answer["output"][0]["content"][0]["text"] == ""
    streamed = events(server.post(RESPONSES, {"model": model, **nothing, "stream": True}))
    names = ["response.created", "response.in_progress", "response.completed"]
    assert [event["type"] for event in streamed] == names and streamed[2]["response"]["output"] is None


def test_generate_streams_responses(server: Server, model: str) -> None:
    options = {"temperature": 0, "num_predict": 4}
    body = {"model": model, "prompt": "Tell me a long story", "options": options}
    *tokens, last = lines(server.post(GENERATE, body))
    assert all(list(token) == ["model", "created_at", "response", "done"] for token in tokens)
    assert (last["response"], last["done_reason"], last["eval_count"]) == ("", "length", 4)


@pytest.mark.parametrize(
    ("path", "body"),
    [(GENERATE, {"keep_alive": -1}), (GENERATE, {}), (CHAT, {"messages": []}), (CHAT, {"stream": True})],
)
def test_a_request_without_words_loads(
    server: Server, model: str, path: str, body: dict[str, Any]
) -> None:
    response = server.post(path, {"model": model, **body})
    answer = response.json()
    words = {"response": ""} if path == GENERATE else {"message": {"role": "assistant", "content": ""}}
    assert response.headers["content-type"] == "application/json; charset=utf-8"
    assert answer == {
        "model": model, "created_at": answer["created_at"], **words, "done": True, "done_reason": "load"
    }  # fmt: skip


def test_unload_and_reload(server: Server, model: str) -> None:
    answer = server.post(GENERATE, {"model": model, "keep_alive": 0}).json()
    assert (answer["done"], answer["done_reason"]) == (True, "unload")

    def loaded_here() -> list[dict[str, Any]]:  # a real server may have others loaded
        return [each for each in server.get("/api/ps").json()["models"] if each["name"] == model]

    eventually(lambda: not loaded_here())
    server.post(GENERATE, {"model": model, "keep_alive": "10m"})
    [loaded] = loaded_here()
    assert {"name", "model", "size", "size_vram", "context_length", "expires_at"} <= set(loaded)
    assert loaded["model"] == model and loaded["context_length"] >= 1024


def test_the_same_seed_says_the_same(server: Server, model: str) -> None:
    body = {"model": model, "messages": STORY, "temperature": 0.8, "seed": 7, "max_tokens": 12}
    said = {server.post(V1, body).json()["choices"][0]["message"]["content"] for _ in range(2)}
    assert len(said) == 1


def test_stop_ends_the_answer_before_the_stop_word(server: Server, model: str) -> None:
    body = {"model": model, "messages": STORY, "temperature": 0, "stop": [" the"], "max_tokens": 200}
    choice = server.post(V1, body).json()["choices"][0]
    assert choice["finish_reason"] == "stop" and " the" not in choice["message"]["content"]


def test_max_tokens_zero_is_no_limit(server: Server, model: str) -> None:
    body = {"model": model, "messages": STORY, "max_tokens": 0, "temperature": 0, "stream": True}
    with server.post(V1, body, stream=True) as response:
        told = [line for line, _ in zip(response.iter_lines(), range(60), strict=False) if line]
    assert len(told) == 30 and all(b'"finish_reason":null' in line for line in told)


ACCEPTED: dict[str, tuple[str, dict[str, Any]]] = {
    "a name without tag": (CHAT, {"messages": HELLO, "model": "BARE"}),
    "unknown options": (CHAT, {"messages": HELLO, "options": {"nonsense": 1}}),
    "think false": (CHAT, {"messages": HELLO, "think": False}),
    "reasoning_effort none": (V1, {"messages": HELLO, "reasoning_effort": "none"}),
    "VAPI's extra fields": (V1, {"messages": HELLO, "call": {"id": "1"}, "metadata": {}}),
    "content parts": (V1, {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]}),
    "a turn of tool calls": (V1, {"messages": [
        *HELLO, {"role": "assistant", "content": None, "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "end_call", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "c1", "content": "done"}]}),
    "responses: a turn of tool calls": (RESPONSES, {"input": [
        *HELLO, {"type": "function_call", "call_id": "c1", "name": "end_call", "arguments": ""},
        {"type": "function_call", "call_id": "c2", "name": "end_call", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "done"},
        {"type": "function_call_output", "call_id": "c2", "output": [
            {"type": "input_text", "text": "done"}]}]}),
    "responses: what it does not know": (RESPONSES, {
        "input": "Hi", "previous_response_id": "resp_1", "metadata": {}, "tool_choice": "none",
        "messages": "Hi", "store": True, "include": [], "reasoning": {"effort": "none"}}),
}  # fmt: skip
LIMITS: dict[str, dict[str, Any]] = {V1: {"max_tokens": 2}, RESPONSES: {"max_output_tokens": 2}}


@pytest.mark.parametrize("case", ACCEPTED)
def test_accepted(server: Server, model: str, case: str) -> None:
    path, body = ACCEPTED[case]
    if body.get("model") == "BARE" and not model.endswith(":latest"):
        pytest.skip("the model is not tagged latest")
    limit = {"options": {**body.get("options", {}), "num_predict": 2}} if path == CHAT else LIMITS[path]
    name = {"model": model.removesuffix(":latest") if "model" in body else model}
    response = server.post(path, {**body, **limit, **name, "stream": False})
    assert response.status_code == 200, response.text
    assert response.json()["model"] == name["model"]


# ---------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------

NOT_FOUND = "model 'nope:1b' not found"
TOOLS = "registry.ollama.ai/library/MODEL does not support tools"
GO = "json: cannot unmarshal string into Go struct field "
MESSAGES = GO + "ChatRequest.messages of type []api.Message"
NUM_CTX = 'option "num_ctx" must be of type integer'

EMBEDDINGS = "This server does not support embeddings. Start it with `--embeddings`"
FORMAT = 'invalid format: "5"; expected "json" or a valid JSON Schema object'
EFFORTS = '"minimal", "low", "medium", "high", "xhigh", "ultra", "max", or "none"'
EFFORT = f'invalid reasoning value: "x" (must be {EFFORTS})'
LIST = "must be a string or array: json: cannot unmarshal number into Go value of type []json.RawMessage"
ITEM = r'struct { Type string "json:\"type\""; Role string "json:\"role\"" }'
FLAT_TOOL = {"type": "function", **TOOL["function"]}
NULL = {"role": "user", "content": None}
NO_ARGUMENTS = {"role": "assistant", "content": None,
                "tool_calls": [{"function": {"name": "f", "arguments": ""}}]}  # fmt: skip


def ask(**fields: Any) -> dict[str, Any]:
    return {"model": "MODEL", "messages": HELLO, **fields}


def give(item: Any, **fields: Any) -> dict[str, Any]:
    return {"model": "MODEL", "input": [item], **fields}


def say(content: Any) -> dict[str, Any]:
    return give({"role": "user", "content": content})


def call(arguments: Any) -> dict[str, Any]:
    return give({"type": "function_call", "name": "f", "arguments": arguments})


ERRORS: dict[str, tuple[str, Any, int, str]] = {
    "unknown model": (CHAT, ask(model="nope:1b"), 404, NOT_FOUND),
    "no model": (CHAT, {"messages": HELLO}, 400, "model is required"),
    "bad JSON": (CHAT, '{"model": "x', 400, "unexpected EOF"),
    "no body": (CHAT, "", 400, "missing request body"),
    "messages as text": (CHAT, ask(messages="hi"), 400, MESSAGES),
    "num_ctx as text": (CHAT, ask(options={"num_ctx": "x"}), 500, NUM_CTX),
    "format": (CHAT, ask(format=5), 500, FORMAT),
    "tools": (CHAT, ask(tools=[TOOL]), 400, TOOLS),
    "think": (CHAT, ask(think=True), 400, '"MODEL" does not support thinking'),
    "keep_alive without unit": (CHAT, ask(keep_alive="-1"), 400, 'time: missing unit in duration "-1"'),
    "generate: unknown model": (GENERATE, {"model": "nope:1b"}, 404, NOT_FOUND),
    "show: unknown model": ("/api/show", {"model": "nope:1b"}, 404, NOT_FOUND),
    "v1: unknown model": (V1, ask(model="nope:1b"), 404, NOT_FOUND),
    "v1: no messages": (V1, ask(messages=[]), 400, "[] is too short - 'messages'"),
    "v1: null content": (V1, ask(messages=[NULL]), 400, "invalid message content type: <nil>"),
    "v1: empty arguments": (V1, ask(messages=[NO_ARGUMENTS]), 400, "invalid tool call arguments"),
    "v1: reasoning_effort": (V1, ask(reasoning_effort="x"), 400, EFFORT),
    "v1: tools": (V1, ask(tools=[TOOL]), 400, TOOLS),
    "v1: tools, streaming": (V1, ask(tools=[TOOL], stream=True), 400, TOOLS),
    "v1: embeddings": ("/v1/embeddings", {"model": "MODEL", "input": "hi"}, 501, EMBEDDINGS),
    "responses: unknown model": (RESPONSES, {"model": "nope:1b", "input": "Hi"}, 404, NOT_FOUND),
    "responses: no model": (RESPONSES, {"input": "Hi"}, 400, "model is required"),
    "responses: reasoning": (RESPONSES, give(NULL, reasoning={"effort": "x"}), 400, EFFORT),
    "responses: thinking": (
        RESPONSES, give(NULL, reasoning={"effort": "low"}), 400, '"MODEL" does not support thinking'),
    "responses: tools": (RESPONSES, give(NULL, tools=[FLAT_TOOL]), 400, TOOLS),
    "responses: tools, streaming": (RESPONSES, give(NULL, tools=[FLAT_TOOL], stream=True), 400, TOOLS),
    "responses: input": (RESPONSES, {"model": "MODEL", "input": 5}, 400, f"input {LIST}"),
    "responses: item": (RESPONSES, give("Hi"), 400,
        f"input[0]: json: cannot unmarshal string into Go value of type {ITEM}"),
    "responses: no type": (
        RESPONSES, give({}), 400, "input[0]: input item missing required 'type' field"),
    "responses: type": (RESPONSES, give({"type": "x"}), 400, 'input[0]: unknown input item type: "x"'),
    "responses: content": (RESPONSES, say(5), 400, f"input[0]: content {LIST}"),
    "responses: a part for the chat": (
        RESPONSES, say([{"type": "text"}]), 400, "input[0]: content[0]: unknown content type: text"),
    "responses: output": (RESPONSES, give({"type": "function_call_output", "output": [{}]}), 400,
        "input[0]: output[0]: unknown content type: "),
    "responses: file": (
        RESPONSES, say([{"type": "input_file"}]), 400, "file inputs are not currently supported"),
    "responses: arguments": (RESPONSES, call("{"), 400,
        "failed to parse function call arguments: unexpected end of JSON input"),
    "responses: arguments as a number": (RESPONSES, call("5"), 400, "failed to parse function call "
        "arguments: Value looks like object, but can't find closing '}' symbol"),
    "responses: arguments as object": (RESPONSES, call({}), 400, "input[0]: json: cannot unmarshal "
        "object into Go struct field ResponsesFunctionCall.arguments of type string"),
    "responses: limit": (RESPONSES, give(NULL, max_output_tokens="5"), 400,
        GO + "ResponsesRequest.max_output_tokens of type int"),
}  # fmt: skip

TYPES = {400: "invalid_request_error", 404: "not_found_error"}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(server: Server, models: dict[str, list[str]], model: str, case: str) -> None:
    path, body, status, words = fill(ERRORS[case], model)
    if "does not support" in words and words.split()[-1] in models[model]:
        pytest.skip(f"no chat model is without {words.split()[-1]} here")
    response = server.post(path, body)
    error: Any = words
    if path.startswith("/v1"):
        error = {"message": words, "type": TYPES.get(status, "api_error"), "param": None, "code": None}
    assert (response.status_code, response.json()) == (status, {"error": error})


@pytest.mark.parametrize("path", [CHAT, V1, RESPONSES])
@pytest.mark.parametrize("name", ["gpt-oss:120b-cloud", "gpt-oss:cloud"])
@stand_in_only
def test_cloud_models_are_refused_without_the_cloud(server: Server, path: str, name: str) -> None:
    response = server.post(path, {"model": name, "messages": HELLO})
    assert response.status_code == 403
    assert response.json() == {"error": "ollama cloud is disabled: remote model is unavailable"}


def test_unknown_paths_and_methods(server: Server) -> None:
    unknown, method = server.get("/api/nothing"), server.get(CHAT)
    assert (unknown.status_code, unknown.text) == (404, "404 page not found")
    assert (method.status_code, method.text) == (405, "405 method not allowed")


# ---------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------


def test_greeting_and_version(server: Server) -> None:
    assert server.get("/").text == "Ollama is running"
    assert requests.head(f"http://{server.host}/", timeout=5).status_code == 200
    assert re.fullmatch(r"\d+\.\d+\.\d+", server.get("/api/version").json()["version"])


def test_models_are_listed_and_shown(server: Server, model: str) -> None:
    listed = server.get("/v1/models").json()
    assert listed["object"] == "list" and model in [entry["id"] for entry in listed["data"]]
    assert all(list(entry) == ["id", "object", "created", "owned_by"] for entry in listed["data"])
    assert server.get(f"/v1/models/{model}").json()["id"] == model
    shown = server.post("/api/show", {"model": model}).json()
    assert {"modelfile", "template", "details", "model_info", "capabilities", "modified_at"} <= set(
        shown
    )
    assert "completion" in shown["capabilities"]


def test_an_unknown_model_is_an_error_object_on_v1(server: Server) -> None:
    response = server.get("/v1/models/none")
    assert response.status_code == 404 and response.json()["error"]["type"] == "not_found_error"


@stand_in_only
def test_pull_links_one_blob_under_every_name(tmp_path: Path) -> None:
    with serving(OLLAMA_MODELS=str(tmp_path)) as server:
        pulled = server.ollama("pull", "llama3", "qwen2.5:7b")
        assert pulled.returncode == 0 and "success" in pulled.stderr
        listed = server.ollama("list").stdout
        assert listed.startswith("NAME") and "llama3:latest" in listed and "qwen2.5:7b" in listed
        library = tmp_path / "manifests/registry.ollama.ai/library"
        digests = {
            json.loads((library / name).read_text())["layers"][0]["digest"]
            for name in ("llama3/latest", "qwen2.5/7b")
        }
        [digest] = digests
        assert (tmp_path / "blobs" / digest.replace(":", "-")).is_file()


@stand_in_only
def test_what_it_pulls_goes_into_the_projects_folder_and_not_into_the_home(tmp_path: Path) -> None:
    home, program = tmp_path / "home", tmp_path / "project/tests/ollama"
    program.parent.mkdir(parents=True)
    home.mkdir()
    program.write_bytes(OLLAMA.read_bytes())
    env = {name: value for name, value in os.environ.items() if name != "OLLAMA_MODELS"}
    env |= {"HOME": str(home), "OLLAMA_HOST": f"127.0.0.1:{free_port()}"}
    with subprocess.Popen([sys.executable, program, "serve"], env=env, stderr=subprocess.PIPE) as server:
        try:
            assert server.stderr and any(b"Listening" in line for line in server.stderr)
            subprocess.run([sys.executable, program, "pull", "llama3"], env=env, check=True)
        finally:
            server.terminate()
    assert list((tmp_path / "project/.models/manifests").rglob("latest")) and not list(home.iterdir())


@stand_in_only
def test_pull_of_a_missing_model_fails(scripted: Server) -> None:
    pulled = scripted.ollama("pull", "nope:missing")
    assert pulled.returncode == 1
    assert pulled.stderr.splitlines()[-1] == "Error: pull model manifest: file does not exist"


def test_clients_need_a_server() -> None:
    nowhere = Server(f"127.0.0.1:{free_port()}")
    for command in (["pull", "llama3"], ["list"]):
        ended = nowhere.ollama(*command)
        assert (ended.returncode, ended.stderr.strip()) == (
            1, "Error: could not connect to ollama server, run 'ollama serve' to start it"
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------
# The life of the server and its runner
# ---------------------------------------------------------------------------------------------


def is_alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


@stand_in_only
@pytest.mark.parametrize("path", [CHAT, V1])
def test_a_runner_that_dies_in_a_stream_ends_it_and_the_next_request_reloads(
    server: Server, model: str, path: str
) -> None:
    # Greedy, the little model tells this story without end.
    greedy = {"temperature": 0, "options": {"temperature": 0}}
    body = {"model": model, "messages": STORY, "stream": True, **greedy}
    with server.post(path, body, stream=True) as response:
        chunks = response.iter_content(None)
        text = next(chunks)
        [runner] = server.state()["runners"]
        os.kill(runner, signal.SIGKILL)
        text += b"".join(chunks)
    response._content = text
    assert response.status_code == 200
    if path == CHAT:
        said = "an error was encountered while running the model: unexpected EOF"
        assert lines(response)[-1] == {"error": said}
        assert not any(line.get("done") for line in lines(response))
    else:
        last = frames(response)[-1]
        assert last["model"] == "" and last["choices"][0] == {
            "index": 0, "delta": {"content": ""}, "finish_reason": None
        }  # fmt: skip
    again = server.post(path, {**body, "stream": False, "max_tokens": 2, "options": {"num_predict": 2}})
    assert again.status_code == 200
    assert server.state()["runners"] != [runner]


def test_a_client_that_closes_stops_the_generation(server: Server, model: str) -> None:
    body = {"model": model, "messages": STORY, "stream": True, "max_tokens": 2000, "temperature": 0}
    with server.post(V1, body, stream=True) as response:
        next(response.iter_content(None))
    if not REAL_HOST:
        seen = eventually(lambda: server.last() if server.last()["state"] != "running" else None)
        assert seen["state"] == "closed" and seen["tokens"] < 2000
    started = time.monotonic()
    assert server.post(V1, {"model": model, "messages": HELLO, "max_tokens": 1}).status_code == 200
    assert time.monotonic() - started < 5


@stand_in_only
def test_terminate_ends_the_runner_too() -> None:
    with serving(OLLAMA_SCRIPT='{"models": ["m"]}') as server:
        assert server.process
        server.post(GENERATE, {"model": "m"})
        [runner] = server.state()["runners"]
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(5) == 0
        eventually(lambda: not is_alive(runner))


@stand_in_only
def test_kill_orphans_the_runner() -> None:
    with serving(OLLAMA_SCRIPT='{"models": ["m"]}') as server:
        assert server.process
        server.post(GENERATE, {"model": "m"})
        [runner] = server.state()["runners"]
        try:
            server.process.kill()
            server.process.wait(5)
            assert is_alive(runner)
        finally:
            os.kill(runner, signal.SIGKILL)


def test_a_taken_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        host = f"127.0.0.1:{taken.getsockname()[1]}"
        ended = Server(host).ollama("serve")
    assert ended.returncode == 1
    assert ended.stderr.strip() == f"Error: listen tcp {host}: bind: address already in use"


@stand_in_only
def test_keep_alive_unloads_an_idle_model(scripted: Server) -> None:
    scripted.post(GENERATE, {"model": "m", "keep_alive": "50ms"})
    eventually(lambda: not scripted.state()["runners"])


# ---------------------------------------------------------------------------------------------
# Script mode
# ---------------------------------------------------------------------------------------------

ASK = {"model": "m", "messages": HELLO}


def contents(response: requests.Response) -> str:
    return "".join(line["message"]["content"] for line in lines(response))


def test_the_default_reply(scripted: Server) -> None:
    assert contents(scripted.post(CHAT, ASK)) == "Hello from the scripted model."


def test_tokens_and_limits(scripted: Server) -> None:
    scripted.script(tokens=["a", "b", "c"])
    assert contents(scripted.post(CHAT, ASK)) == "abc"
    answer = scripted.post(V1, {**ASK, "max_tokens": 2}).json()
    assert answer["choices"][0]["message"]["content"] == "ab"
    assert (
        answer["choices"][0]["finish_reason"] == "length" and answer["usage"]["completion_tokens"] == 2
    )
    for limit, said in ((2, "ab"), (0, "abc"), (None, "abc")):
        body = {"model": "m", "input": "Hi", "max_output_tokens": limit}
        answer = scripted.post(RESPONSES, body).json()
        assert answer["output"][0]["content"][0]["text"] == said and answer["status"] == "completed"
    scripted.script(repeat=-1)
    assert contents(scripted.post(CHAT, {**ASK, "options": {"num_predict": 300}})) == "word " * 300


def test_tokens_keep_their_cadence_on_parallel_streams(scripted: Server) -> None:
    scripted.script(repeat=40, interval_ms=10, first_ms=50)
    answers = [scripted.in_background(CHAT, ASK) for _ in range(8)]
    for answer in answers:
        *tokens, _ = lines(answer())
        at = [float(token["created_at"][17:-1]) for token in tokens]
        # An absolute schedule: what comes late does not move what follows.
        assert 0.35 < (at[-1] - at[0]) % 60 < 0.6

    def done() -> bool:  # which the server says of itself once the last line has left
        seen = scripted.get("/test/requests").json()[-8:]
        return all(request["tokens"] == 40 and request["state"] == "done" for request in seen)

    eventually(done)


@pytest.mark.parametrize("path", [CHAT, V1, RESPONSES])
@pytest.mark.parametrize("stream", [True, False])
def test_cut_before_the_first_token_is_an_error(scripted: Server, path: str, stream: bool) -> None:
    scripted.script(cut_after=0, times=1)
    response = scripted.post(path, {**ASK, "input": "Hi", "stream": stream})
    assert response.status_code == 500 and "model runner has unexpectedly stopped" in response.text
    assert scripted.post(path, ASK).status_code == 200


def test_cut_in_the_stream_kills_the_runner(scripted: Server) -> None:
    scripted.post(GENERATE, {"model": "m"})
    [runner] = scripted.state()["runners"]
    scripted.script(tokens=["a", "b", "c"], cut_after=2)
    *tokens, error = lines(scripted.post(CHAT, ASK))
    assert [token["message"]["content"] for token in tokens] == ["a", "b"] and "unexpected EOF" in error[
        "error"
    ]
    assert not is_alive(runner) and scripted.last()["state"] == "cut"
    assert frames(scripted.post(V1, {**ASK, "stream": True}))[-1]["model"] == ""
    connection = http.client.HTTPConnection(scripted.host)
    for _ in range(2):  # the second fails where the first has a chunk too many
        connection.request("POST", RESPONSES, '{"model": "m", "input": "Hi", "stream": true}')
        *_, last, _ = connection.getresponse().read().split(b"\n\n")
        assert last.startswith(b"event: response.output_text.delta\n") and b'"delta":"b"' in last
    connection.close()


def test_drop_closes_the_connection_without_an_end(scripted: Server) -> None:
    scripted.script(tokens=["a", "b"], drop_after=1)
    with pytest.raises(requests.exceptions.ChunkedEncodingError):
        scripted.post(CHAT, ASK)
    assert scripted.last()["state"] == "cut"
    scripted.script(drop_after=0)
    with pytest.raises(requests.exceptions.ConnectionError):
        scripted.post(CHAT, ASK)


@pytest.mark.parametrize("script", [{"hang_after": 0}, {"first_ms": 60000}, {"load_ms": 60000}])
def test_a_client_that_goes_away_while_it_waits_is_seen(
    scripted: Server, script: dict[str, Any]
) -> None:
    scripted.script(**script)
    with pytest.raises(requests.exceptions.ReadTimeout):
        requests.post(f"http://{scripted.host}{CHAT}", json=ASK, timeout=0.2)
    gone = time.time()
    seen = eventually(lambda: scripted.last() if scripted.last()["ended"] else None)
    assert seen["state"] == "closed" and seen["tokens"] == 0 and seen["ended"] - gone < 0.5


def test_hang_keeps_the_connection_open(scripted: Server) -> None:
    scripted.script(tokens=["a", "b"], hang_after=1)
    with requests.post(f"http://{scripted.host}{CHAT}", json=ASK, stream=True, timeout=0.5) as response:
        chunks = response.iter_content(None)
        assert b'"content":"a"' in next(chunks)
        with pytest.raises(requests.exceptions.ConnectionError):
            next(chunks)


@pytest.mark.parametrize("status", [500, 503])
def test_status_refuses_every_generation(scripted: Server, status: int) -> None:
    scripted.script(status=status, error="no")
    chat, v1 = scripted.post(CHAT, ASK), scripted.post(V1, ASK)
    assert (chat.status_code, chat.json()) == (status, {"error": "no"})
    assert (v1.status_code, v1.json()["error"]["message"]) == (status, "no")
    assert scripted.post(GENERATE, {"model": "m"}).status_code == 200


def test_load_error(scripted: Server) -> None:
    scripted.script(load_error="out of memory", times=1)
    response = scripted.post(GENERATE, {"model": "m"})
    assert (response.status_code, response.json()) == (500, {"error": "out of memory"})
    assert scripted.post(GENERATE, {"model": "m"}).status_code == 200


def test_tool_calls_on_both_apis(scripted: Server) -> None:
    call = {"name": "end_call", "arguments": {"why": "bye"}}
    scripted.script(tool_calls=[call], capabilities={"m": ["completion", "tools"]})
    said, last = lines(scripted.post(CHAT, {**ASK, "tools": [TOOL]}))
    assert said["message"]["tool_calls"][0]["function"] == {"index": 0, **call}
    assert last["done_reason"] == "stop"
    first, finish, _ = frames(scripted.post(V1, {**ASK, "tools": [TOOL], "stream": True}))
    [called] = first["choices"][0]["delta"]["tool_calls"]
    assert called["index"] == 0 and called["type"] == "function" and called["id"].startswith("call_")
    assert called["function"] == {"name": "end_call", "arguments": '{"why":"bye"}'}
    assert finish["choices"][0] == {"index": 0, "delta": {}, "finish_reason": "tool_calls"}
    assert (
        scripted.post(V1, {**ASK, "tools": [TOOL]}).json()["choices"][0]["finish_reason"] == "tool_calls"
    )


def test_v1_responses_calls_a_tool_instead_of_a_message(scripted: Server) -> None:
    called = {"name": "end_call", "arguments": {"why": "bye"}}
    scripted.script(tool_calls=[called, called], capabilities={"m": ["completion", "tools"]})
    body = {"model": "m", "input": "Bye", "tools": [FLAT_TOOL]}
    answer = scripted.post(RESPONSES, body).json()
    assert answer["tools"] == [{**FLAT_TOOL, "description": None, "strict": None}]
    for item in answer["output"]:
        assert item["id"].startswith("fc_") and item["call_id"].startswith("call_")
        assert item == {
            "id": item["id"], "type": "function_call", "status": "completed",
            "call_id": item["call_id"], "name": "end_call", "arguments": '{"why":"bye"}',
        }  # fmt: skip
    _, _, *told, completed = events(scripted.post(RESPONSES, {**body, "stream": True}))
    names = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done"]
    names = [f"response.{name}" for name in [*names, "output_item.done"]]
    assert [event["type"] for event in told] == 2 * names
    assert [event["output_index"] for event in told] == [0] * 4 + [1] * 4
    output = completed["response"]["output"]
    assert [event["item"] for event in told if "done" in event["type"] and "item" in event] == output
    assert told[0]["item"] == {**output[0], "status": "in_progress", "arguments": ""}
    assert told[1]["delta"] == told[2]["arguments"] == '{"why":"bye"}'


def test_v1_responses_tells_thoughts_as_an_item_of_their_own(scripted: Server) -> None:
    scripted.script(thinking="let me see", capabilities={"m": ["completion", "thinking"]})
    body = {"model": "m", "input": "Hi", "reasoning": {"effort": "low"}}
    thought, message = scripted.post(RESPONSES, body).json()["output"]
    summary = [{"type": "summary_text", "text": "let me see"}]
    assert thought.pop("id").startswith("rs_") and message["type"] == "message"
    assert thought == {"type": "reasoning", "summary": summary, "encrypted_content": "let me see"}
    _, _, added, *told, completed = events(scripted.post(RESPONSES, {**body, "stream": True}))
    thought = completed["response"]["output"][0]
    assert added["item"] == {"id": thought["id"], "type": "reasoning", "summary": []}
    heard = [event for event in told if event["output_index"] == 0]
    assert "".join(event.get("delta", "") for event in heard) == "let me see"
    assert heard[0]["type"] == "response.reasoning_summary_text.delta"
    assert [(event["type"], event.get("text"), event.get("item")) for event in heard[-2:]] == [
        ("response.reasoning_summary_text.done", "let me see", None),
        ("response.output_item.done", None, thought),
    ]
    assert {event["output_index"] for event in told[len(heard) :]} == {1}
    none = scripted.post(RESPONSES, {**body, "reasoning": {"effort": "none"}}).json()
    assert [item["type"] for item in none["output"]] == ["message"]


def test_thinking_unless_told_not_to(scripted: Server) -> None:
    scripted.script(thinking="let me see", capabilities={"m": ["completion", "thinking"]})
    message = scripted.post(CHAT, {**ASK, "stream": False}).json()["message"]
    assert message["thinking"] == "let me see"
    [first, *_] = frames(scripted.post(V1, {**ASK, "stream": True}))
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": "", "reasoning": "let "}
    assert "thinking" not in scripted.post(CHAT, {**ASK, "think": False}).text
    assert "reasoning" not in scripted.post(V1, {**ASK, "reasoning_effort": "none"}).text
    assert scripted.post("/api/show", {"model": "m"}).json()["capabilities"] == [
        "completion",
        "thinking",
    ]


def test_embeddings(scripted: Server) -> None:
    scripted.script(embeddings=True)
    answer = scripted.post("/v1/embeddings", {"model": "m", "input": ["a", "b"]}).json()
    assert [entry["index"] for entry in answer["data"]] == [0, 1] and answer["object"] == "list"


def test_requests_queue_for_a_slot_and_a_full_queue_refuses() -> None:
    environment = {
        "OLLAMA_SCRIPT": '{"models": ["m"], "repeat": -1, "interval_ms": 10}',
        "OLLAMA_MAX_QUEUE": "1",
    }
    with serving(**environment) as server:

        def states() -> list[str]:
            return [request["state"] for request in server.get("/test/requests").json()]

        with server.post(CHAT, ASK, stream=True) as running:
            chunks = running.iter_content(None)
            next(chunks)
            queued = server.in_background(CHAT, {**ASK, "options": {"num_predict": 2}})
            eventually(lambda: states() == ["running", "queued"])
            refused = server.post(CHAT, ASK)
            assert refused.status_code == 503
            assert refused.json() == {
                "error": "server busy, please try again.  maximum pending requests exceeded"
            }
        assert contents(queued()) == "word word "
        eventually(lambda: states() == ["closed", "done", "failed"])


def test_the_server_can_die_at_a_request() -> None:
    with serving(OLLAMA_SCRIPT='{"models": ["m"], "die_at_request": 2, "die_tokens": 1}') as server:
        assert server.process and server.post(CHAT, ASK).status_code == 200
        [runner] = server.state()["runners"]
        try:
            with pytest.raises(requests.exceptions.ChunkedEncodingError):
                server.post(CHAT, ASK)
            assert server.process.wait(5) == -signal.SIGKILL
        finally:
            os.kill(runner, signal.SIGKILL)


def test_requests_are_remembered_with_their_bodies(scripted: Server) -> None:
    before = scripted.post(CHAT, ASK) and scripted.last()["n"]
    scripted.post(V1, {**ASK, "stream": True})
    [seen] = scripted.get(f"/test/requests?after={before}").json()
    assert (seen["method"], seen["path"], seen["body"]) == ("POST", V1, {**ASK, "stream": True})
    assert seen["headers"]["host"] == scripted.host and seen["started"] <= seen["ended"]
    scripted.post("/test/clear", {})
    assert scripted.get("/test/requests").json() == []


@stand_in_only
def test_a_script_in_front_of_the_real_model(server: Server, model: str) -> None:
    server.script(tokens=["scripted"], times=1)
    body = {"model": model, "messages": HELLO, "options": {"num_predict": 3}}
    assert contents(server.post(CHAT, body)) == "scripted"
    assert lines(server.post(CHAT, body))[-1]["prompt_eval_count"] > 10
