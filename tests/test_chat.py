"""Chat jobs: what `handler(event)` takes and gives, against a scripted server on a real socket."""

from __future__ import annotations

import http.server
import json
import math
import re
import threading
from typing import Any

import pytest
from conftest import Ollama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rp_handler
from rp_handler import MAX_TOKENS, SYSTEM_PROMPT, handler


def ask(**fields: Any) -> dict[str, Any]:
    return handler({"id": "job-1", "input": fields})


def error_of(answer: dict[str, Any]) -> str:
    assert set(answer) == {"error", "status"} and answer["status"] == "error", answer
    error = answer["error"]
    assert isinstance(error, str) and error and "\n" not in error and "Traceback" not in error
    return error


def test_a_message_is_answered_with_words_usage_and_timings(ollama: Ollama) -> None:
    ollama.script(tokens=["Hel", "lo", "!"], load_ms=1)
    answer = ask(type="chat", message="Hi")
    assert answer["status"] == "success"
    assert answer["response"] == "Hello!"
    assert answer["model"] == "llama3:latest"
    usage = answer["usage"]
    assert usage["completion_tokens"] == 3 and usage["prompt_tokens"] > 0
    assert usage["total_tokens"] == usage["prompt_tokens"] + 3
    assert set(answer["timings"]) == {"load_s", "prompt_s", "generate_s", "total_s"}
    assert all(0 <= seconds < 60 for seconds in answer["timings"].values())
    assert "tool_calls" not in answer
    json.dumps(answer, allow_nan=False)


def test_type_may_be_left_out(ollama: Ollama) -> None:
    assert ask(message="Hi")["status"] == "success"


def test_history_and_system_message_reach_the_server(ollama: Ollama) -> None:
    history = [
        {"role": "user", "content": "My name is Ada."},
        {"role": "assistant", "content": "Hello Ada."},
        {"role": "user", "content": "What is my name?"},
    ]
    ask(messages=history, system="Be brief.")
    assert ollama.last()["body"]["messages"] == [{"role": "system", "content": "Be brief."}, *history]


@pytest.mark.parametrize(
    ("fields", "system"),
    [
        ({"message": "Hi"}, SYSTEM_PROMPT),
        ({"message": "Hi", "system": "Rhyme."}, "Rhyme."),
        ({"messages": [{"role": "user", "content": "Hi"}]}, SYSTEM_PROMPT),
        (
            {"messages": [{"role": "system", "content": "Own."}, {"role": "user", "content": "Hi"}]},
            "Own.",
        ),
    ],
)
def test_the_system_prompt_stands_in_where_a_chat_brings_none(
    ollama: Ollama, fields: dict[str, Any], system: str
) -> None:
    ask(**fields)
    turns = ollama.last()["body"]["messages"]
    assert [turn["content"] for turn in turns if turn["role"] == "system"] == [system]


def test_the_role_developer_is_system_which_ollama_knows(ollama: Ollama) -> None:
    turns = [{"role": "developer", "content": "Rhyme."}, {"role": "user", "content": "Hi"}]
    ask(messages=turns)
    assert ollama.last()["body"]["messages"] == [{"role": "system", "content": "Rhyme."}, turns[1]]


@pytest.mark.parametrize("function", [{"name": "clock", "arguments": {}}, {"name": "clock"}])
def test_a_call_without_arguments_goes_back_as_this_worker_answers_it(
    ollama: Ollama, function: dict[str, Any]
) -> None:
    asked = {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}
    history = [{"role": "user", "content": "Hi"}, asked, {"role": "tool", "content": "12:30"}]
    assert ask(messages=history, system="")["status"] == "success"
    assert ollama.last()["body"]["messages"] == history


def test_the_empty_system_message_means_none(ollama: Ollama) -> None:
    ask(message="Hi", system="")
    assert ollama.last()["body"]["messages"] == [{"role": "user", "content": "Hi"}]


def test_what_a_chat_may_set_goes_to_ollama_as_it_is(ollama: Ollama) -> None:
    ollama.script(capabilities={"qwen2.5:7b": ["completion", "tools", "thinking"]})
    tools = [{"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}]
    options = {"temperature": 0, "num_predict": 7, "num_ctx": 4096, "stop": ["x"], "seed": 4}
    ask(message="Hi", model="qwen2.5:7b", options=options, format="json", tools=tools, think=True)
    body = ollama.last()["body"]
    assert body["model"] == "qwen2.5:7b"
    assert body["options"] == options
    assert (body["format"], body["tools"], body["think"]) == ("json", tools, True)


def test_ollama_is_asked_for_a_whole_answer_and_not_to_think(ollama: Ollama) -> None:
    ask(message="Hi")
    body = ollama.last()["body"]
    assert body["stream"] is False
    assert body["think"] is False


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        (None, MAX_TOKENS),
        ({}, MAX_TOKENS),
        ({"num_predict": 0}, MAX_TOKENS),
        ({"num_predict": -1}, MAX_TOKENS),
    ],
)
def test_a_chat_without_a_limit_gets_max_tokens(ollama: Ollama, options: Any, limit: int) -> None:
    ask(message="Hi", options=options)
    assert ollama.last()["body"]["options"]["num_predict"] == limit


def test_tool_calls_are_part_of_the_answer(ollama: Ollama) -> None:
    call = {"name": "clock", "arguments": {"zone": "UTC"}}
    ollama.script(tool_calls=[call], capabilities={"llama3:latest": ["completion", "tools"]})
    tools = [{"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}]
    answer = ask(message="What time is it?", tools=tools)
    assert answer["status"] == "success"
    assert [called["function"]["name"] for called in answer["tool_calls"]] == ["clock"]
    assert answer["tool_calls"][0]["function"]["arguments"] == {"zone": "UTC"}


def test_multi_byte_text_comes_through(ollama: Ollama) -> None:
    ollama.script(tokens=["Grüße ", "an ", "日本", " 🎈"])
    assert ask(message="Grüß 日本 🎈")["response"] == "Grüße an 日本 🎈"
    assert ollama.last()["body"]["messages"][-1]["content"] == "Grüß 日本 🎈"


def nested(depth: int) -> Any:
    value: Any = "deep"
    for _ in range(depth):
        value = [value]
    return value


BAD_EVENTS: list[tuple[Any, str]] = [
    (None, "input"),
    ({}, "input"),
    ([], "input"),
    ({"input": None}, "input"),
    ({"input": "Hi"}, "input"),
    ({"input": []}, "input"),
    ({"input": {}}, "message"),
    ({"input": {"type": "sing", "message": "Hi"}}, "'sing'.*chat.*vapi_webhook"),
    ({"input": {"type": 7}}, "type 7"),
    ({"input": {"type": "openai"}}, "Unknown route"),
    ({"input": {"type": ["chat"]}}, "type"),
    ({"input": {"type": None, "message": "Hi"}}, "type"),
    ({"input": {"message": ""}}, "not empty"),
    ({"input": {"message": " \n"}}, "not empty"),
    ({"input": {"message": 5}}, "text"),
    ({"input": {"message": "Hi", "messages": [{"role": "user", "content": "Hi"}]}}, "not both"),
    ({"input": {"messages": []}}, "not empty"),
    ({"input": {"messages": "Hi"}}, "list"),
    ({"input": {"messages": ["Hi"]}}, "role"),
    ({"input": {"messages": [{"content": "Hi"}]}}, "role"),
    ({"input": {"message": "Hi", "system": 5}}, "system"),
    ({"input": {"message": "Hi", "options": [1]}}, "options"),
    ({"input": {"message": "Hi", "options": {"num_ctx": "x"}}}, "num_ctx.*integer"),
    ({"input": {"message": "Hi", "options": {"num_ctx": 8192}}}, "anew.*OLLAMA_CONTEXT_LENGTH"),
    ({"input": {"message": "Hi", "options": {"num_batch": 512}}}, "anew.*PARAMETER num_batch"),
    ({"input": {"message": "Hi", "options": {"num_gpu": 0}}}, "anew.*PARAMETER num_gpu"),
    ({"input": {"message": "Hi", "options": {"main_gpu": 0}}}, "anew.*PARAMETER main_gpu"),
    ({"input": {"message": "Hi", "options": {"use_mmap": False}}}, "anew.*PARAMETER use_mmap"),
    ({"input": {"message": "Hi", "options": {"num_thread": 4}}}, "anew.*PARAMETER num_thread"),
    ({"input": {"message": "Hi", "format": 5}}, "invalid format"),
    ({"input": {"message": "Hi", "model": 5}}, "model"),
    ({"input": {"message": "Hi", "model": "nope:1b"}}, "'nope:1b' not found.*llama3:latest, qwen2.5:7b"),
    ({"input": {"message": "Hi", "model": "../etc/passwd"}}, "name"),
    ({"input": {"message": "Hi", "model": "/etc/passwd"}}, "name"),
    ({"input": {"message": "Hi", "model": "http://example.com/m"}}, "name"),
    ({"input": {"message": "Hi", "model": "gpt-oss:120b-cloud"}}, "is a cloud model; this worker"),
    ({"input": {"message": "Hi", "model": "kimi-k2:cloud"}}, "is a cloud model; this worker"),
    ({"input": {"message": "Hi", "think": True}}, "does not support thinking"),
    ({"input": {"message": "Hi", "tools": [{"type": "function", "function": {"name": "f"}}]}}, "tools"),
    ({"input": {"message": "Hi", "stream": True}}, "STREAMING"),
    ({"input": {"message": "Hi", "stream": "yes"}}, "true or false"),
    ({"input": {"message": "Hi", "options": {"temperature": math.nan}}}, "NaN"),
    ({"input": {"message": "Hi", "options": {"stop": b"x"}}}, "bytes"),
    ({"input": {"message": "Hi", "tools": nested(100_000)}}, "nested too deeply"),
    ({"input": {"type": nested(100_000)}}, "nested too deeply"),
    ({"input": {"type": "vapi_webhook"}}, "webhook_data"),
    ({"input": {"type": "vapi_webhook", "webhook_data": {"message": 5}}}, "webhook_data"),
    ({"input": {"type": "vapi_webhook", "webhook_data": {"message": ""}}}, "not empty"),
]


@pytest.mark.parametrize(("event", "words"), BAD_EVENTS)
def test_a_bad_job_gets_one_line_that_says_what_is_wrong(ollama: Ollama, event: Any, words: str) -> None:
    assert re.search(words, error_of(handler(event)))


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ({"status": 400, "error": "bad\nrequest"}, r"Ollama \(400\): bad request"),
        ({"status": 500, "error": "no room"}, r"Ollama \(500\): no room"),
        ({"status": 503, "error": "server busy, please try again."}, r"Ollama \(503\): server busy"),
        ({"cut_after": 2}, "unexpected EOF"),
        ({"drop_after": 2}, "broke"),
        ({"hang_after": 0}, "REQUEST_TIMEOUT=5"),
        ({"hang_after": 2}, "REQUEST_TIMEOUT=5"),
    ],
)
def test_a_server_that_fails_is_an_error_and_never_a_short_answer(
    ollama: Ollama, script: dict[str, Any], words: str
) -> None:
    ollama.script(**script)
    assert re.search(words, error_of(ask(message="Hi")))


class Truncated(http.server.BaseHTTPRequestHandler):
    """A server whose stream ends in good order, but for the closing line."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        line = {"model": "m", "message": {"role": "assistant", "content": "Hel"}, "done": False}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(line).encode() + b"\n")

    do_GET = do_POST

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.usefixtures("ollama")
@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_without_its_closing_line_is_an_error(
    monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Truncated) as truncated:
        threading.Thread(target=truncated.serve_forever, daemon=True).start()
        monkeypatch.setattr(rp_handler, "ADDRESS", f"127.0.0.1:{truncated.server_port}")
        monkeypatch.setattr(rp_handler, "TRIES", {})
        event = {"id": "job-1", "input": {"message": "Hi", "stream": stream}}
        *_, last = rp_handler.answer(rp_handler.Job(event, streams=True))
        assert isinstance(last, dict) and "broke off before its end" in error_of(last)
        truncated.shutdown()


def test_a_webhook_in_the_flat_form_is_answered_through_chat(ollama: Ollama) -> None:
    ollama.script(tokens=["Good", " day"])
    answer = ask(type="vapi_webhook", webhook_data={"message": "Hello?", "call_id": "call-7"})
    assert answer == {"status": "success", "vapi_response": "Good day", "call_id": "call-7"}
    assert ollama.last()["body"]["messages"][-1] == {"role": "user", "content": "Hello?"}


def test_an_infinite_answer_ends_at_the_limit_of_tokens(ollama: Ollama) -> None:
    ollama.script(repeat=-1)
    assert ask(message="Hi", options={"num_predict": 9})["usage"]["completion_tokens"] == 9


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = (
    "type",
    "message",
    "messages",
    "model",
    "system",
    "options",
    "format",
    "tools",
    "think",
    "stream",
)
inputs = st.dictionaries(
    st.sampled_from([*FIELDS, "webhook_data", "openai_route", "openai_input"]), json_values
)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(input=inputs | json_values)
def test_any_input_gets_one_answer_that_json_can_write(ollama: Ollama, input: Any) -> None:
    answer = handler({"id": "job-1", "input": input})
    assert answer["status"] in ("success", "error")
    if answer["status"] == "error":
        assert "please report" not in error_of(answer), "a defect reached the last resort"
    json.dumps(answer, ensure_ascii=False, allow_nan=False).encode()
