"""VAPI's server messages: the exact answer to every type, through `handler` and through the relay."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import TESTS, Ollama, eventually, free_port
from endpoint import Endpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_chat import json_values

import rp_handler
from rp_handler import handler

CALL = {"id": "call-1", "orgId": "org-1", "customer": {"number": "+15550100"}}


def job_for(message: Any, **beside: Any) -> dict[str, Any]:
    return handler(
        {
            "id": "job-1",
            "input": {"type": "vapi_webhook", "webhook_data": {"message": message, **beside}},
        }
    )


def answer(kind: str, **fields: Any) -> Any:
    done = job_for({"type": kind, "call": CALL, "timestamp": 1795000000000, **fields})
    assert set(done) == {"status", "vapi_response", "call_id"}, done
    assert done["status"] == "success" and done["call_id"] == "call-1"
    return done["vapi_response"]


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VAPI_ASSISTANT_ID", "VAPI_TRANSFER_NUMBER", "RUNPOD_ENDPOINT_ID"):
        monkeypatch.setattr(rp_handler, name, "")


# -- what needs an answer, and no model -------------------------------------------------------------

ANSWERED: list[tuple[str, dict[str, Any], Any]] = [
    ("knowledge-base-request", {"messages": []}, {"documents": []}),
    ("call.endpointing.request", {"messages": []}, {"timeoutSeconds": 0.5}),
    ("campaign.predial", {"campaignId": "c-1"}, {"eligible": True}),
    ("voice-request", {"text": "Hi", "sampleRate": 16000}, {"error": "This worker makes no audio"}),
    ("assistant-request", {"phoneNumber": {"number": "+15550199"}}, {"error": "No assistant is set up"}),
    ("transfer-destination-request", {}, {"error": "There is no number"}),
    ("handoff-destination-request", {}, {"error": "There is no assistant"}),
]
TOLD = [
    "status-update",
    "end-of-call-report",
    "hang",
    "conversation-update",
    "transcript",
    'transcript[transcriptType="final"]',
    "speech-update",
    "model-output",
    "user-interrupted",
    "transfer-update",
    "voice-input",
    "language-change-detected",
    "assistant.started",
    "assistant.speechStarted",
    "phone-call-control",
    "chat.created",
    "chat.deleted",
    "session.created",
    "session.updated",
    "session.deleted",
    "call.deleted",
    "call.delete.failed",
    "call.artifact.upload",
    "a-type-yet-to-come",
]


@pytest.mark.parametrize(("kind", "fields", "expected"), ANSWERED, ids=[row[0] for row in ANSWERED])
def test_quick_messages_are_answered_without_the_model(
    ollama: Ollama, kind: str, fields: dict[str, Any], expected: dict[str, Any]
) -> None:
    said = answer(kind, **fields)
    if "error" in expected:
        assert set(said) == {"error"} and said["error"].startswith(expected["error"])
    else:
        assert said == expected
    assert ollama.requests() == []


@pytest.mark.parametrize("kind", TOLD)
def test_what_is_only_told_is_answered_empty_without_the_model(ollama: Ollama, kind: str) -> None:
    assert answer(kind, artifact={"transcript": "private"}) == {}
    assert ollama.requests() == []


def test_assistant_request_names_the_assistant_that_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rp_handler, "VAPI_ASSISTANT_ID", "as-1")
    assert answer("assistant-request") == {"assistantId": "as-1"}


def test_assistant_request_makes_an_assistant_that_talks_to_this_endpoint(
    monkeypatch: pytest.MonkeyPatch, ollama: Ollama
) -> None:
    monkeypatch.setattr(rp_handler, "RUNPOD_ENDPOINT_ID", "abc123")
    assert answer("assistant-request") == {
        "assistant": {
            "firstMessage": "Hello! How can I help you?",
            "model": {
                "provider": "custom-llm",
                "url": "https://api.runpod.ai/v2/abc123/openai/v1",
                "model": "llama3:latest",
                "messages": [{"role": "system", "content": rp_handler.SYSTEM_PROMPT}],
            },
        }
    }
    assert ollama.requests() == []


def test_destinations_come_from_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rp_handler, "VAPI_TRANSFER_NUMBER", "+15550123")
    monkeypatch.setattr(rp_handler, "VAPI_ASSISTANT_ID", "as-1")
    assert answer("transfer-destination-request") == {
        "destination": {"type": "number", "number": "+15550123"}
    }
    assert answer("handoff-destination-request") == {
        "destination": {"type": "assistant", "assistantId": "as-1"}
    }


CALL_ID = "0f3b6c1e-8a34-4b58-9a6e-1f0f5a4b7c21"


@pytest.mark.parametrize(
    ("call_id", "fields", "line"),
    [
        (
            CALL_ID,
            {
                "endedReason": "customer-ended-call",
                "startedAt": "2026-11-01T10:00:00.000Z",
                "endedAt": "2026-11-01T10:01:02.500Z",
            },
            f"call={CALL_ID} ended: customer-ended-call after 62.5 s",
        ),
        (
            CALL_ID.upper(),
            {"endedReason": "call.in-progress.error-providerfault-custom-llm-500-server-error"},
            "ended: call.in-progress.error-providerfault-custom-llm-500-server-error after - s",
        ),
        (CALL_ID, {"endedReason": "voicemail", "durationSeconds": 9}, "ended: voicemail after 9 s"),
        ("15551234567", {"endedReason": "Zebra"}, "call=- ended: - after - s"),
        ("zebra-1", {"endedReason": "zebra"}, "call=- ended: - after - s"),
        ("+15551234567", {"endedReason": "he said zebra"}, "call=- ended: - after - s"),
        (5, {"endedReason": None, "startedAt": 5, "endedAt": None}, "call=- ended: - after - s"),
        (None, {"endedReason": "zebra-zebra", "durationSeconds": "zebra"}, "call=- ended: - after - s"),
    ],
)
def test_end_of_call_logs_one_line_and_no_transcript(
    capfd: pytest.CaptureFixture[str], call_id: Any, fields: dict[str, Any], line: str
) -> None:
    message = {"type": "end-of-call-report", "call": {"id": call_id}, **fields}
    assert job_for({**message, "artifact": {"transcript": "User: zebra"}})["vapi_response"] == {}
    logged = capfd.readouterr().err
    assert line in logged and "zebra" not in logged.lower() and "1555" not in logged
    assert len(logged.splitlines()) == 2  # this, and the job's own


# -- tool calls ---------------------------------------------------------------------------------


def called(name: str, arguments: Any, id: str = "tc-1") -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: Any) -> str:
        raise OSError("the line\nis dead")

    def slow(seconds: float) -> str:
        time.sleep(seconds)
        return "late"

    own = {"echo": lambda text: f"said {text}", "fail": fail, "slow": slow, "table": lambda: {"a": [1]}}
    monkeypatch.setattr(rp_handler, "TOOLS", {**rp_handler.TOOLS, **own})


@pytest.mark.usefixtures("tools")
@pytest.mark.parametrize(
    "call",
    [
        called("echo", {"text": "yes"}),
        called("echo", '{"text": "yes"}'),
        {"id": "tc-1", "name": "echo", "arguments": {"text": "yes"}},
        {"id": "tc-1", "name": "echo", "parameters": {"text": "yes"}},
        {"id": "tc-1", "name": "echo", "parameters": '{"text": "yes"}'},
        {"id": "tc-1", "type": "function", "function": {"name": "echo", "parameters": {"text": "yes"}}},
    ],
)
def test_arguments_are_read_in_every_form(call: dict[str, Any]) -> None:
    assert answer("tool-calls", toolCallList=[call]) == {
        "results": [{"toolCallId": "tc-1", "name": "echo", "result": "said yes"}]
    }


@pytest.mark.usefixtures("tools")
@pytest.mark.parametrize(
    ("call", "error"),
    [
        (called("nope", {}), "There is no tool 'nope'; there is ask_model, echo"),
        (called("echo", "{not json"), "echo failed: its arguments are not JSON"),
        (called("echo", [1]), "echo failed: its arguments must be a JSON object"),
        (called("echo", '"text"'), "echo failed: its arguments must be a JSON object"),
        (called("echo", {"wrong": 1}), "echo failed: .*unexpected keyword argument 'wrong'"),
        (called("echo", None), "echo failed: .*missing"),
        (called("fail", {}), "fail failed: the line is dead"),
        ({"id": "tc-1"}, "There is no tool ''"),
        ({"id": "tc-1", "function": "echo"}, "There is no tool ''"),
        (called(["x"], {}), "There is no tool ''"),  # type: ignore[arg-type]
    ],
)
def test_a_call_that_fails_is_an_error_for_itself_alone(ollama: Ollama, call: Any, error: str) -> None:
    good = called("echo", {"text": "yes"}, "tc-2")
    failed, fine = answer("tool-calls", toolCallList=[call, good])["results"]
    assert set(failed) == {"toolCallId", "name", "error"} and failed["toolCallId"] == "tc-1"
    assert re.match(error, failed["error"]) and "\n" not in failed["error"]
    assert fine == {"toolCallId": "tc-2", "name": "echo", "result": "said yes"}
    assert ollama.requests() == [], "the model made an answer up"


@pytest.mark.usefixtures("tools")
def test_results_come_in_the_order_of_the_calls_and_side_by_side() -> None:
    calls = [called("slow", {"seconds": 0.4 - place / 10}, f"id {place}") for place in range(4)]
    started = time.monotonic()
    results = answer("tool-calls", toolCallList=calls)["results"]
    assert time.monotonic() - started < 0.95, "one after the other it takes 1 s"
    assert [result["toolCallId"] for result in results] == ["id 0", "id 1", "id 2", "id 3"]
    assert {result["result"] for result in results} == {"late"}


@pytest.mark.usefixtures("tools")
def test_a_tool_that_is_too_slow_is_an_error_and_holds_up_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rp_handler, "TOOL_SECONDS", 0.3)
    calls = [called("slow", {"seconds": 3}, "a"), called("echo", {"text": "yes"}, "b")]
    late, fine = answer("tool-calls", toolCallList=calls)["results"]
    assert late == {"toolCallId": "a", "name": "slow", "error": "The tool took longer than 0.3 s."}
    assert fine["result"] == "said yes"


def test_ask_model_is_answered_through_chat_in_one_line(ollama: Ollama) -> None:
    ollama.script(tokens=["It is\n", "noon."])
    (result,) = answer("tool-calls", toolCallList=[called("ask_model", {"message": "Time?"})])["results"]
    assert result == {"toolCallId": "tc-1", "name": "ask_model", "result": "It is noon."}
    assert ollama.last()["body"]["messages"][-1]["content"] == "Time?"


def test_a_slow_model_stops_generating_when_the_tools_time_is_over(
    ollama: Ollama, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rp_handler, "TOOL_SECONDS", 0.3)
    ollama.script(repeat=-1, interval_ms=20)
    (result,) = answer("tool-calls", toolCallList=[called("ask_model", {"message": "Talk."})])["results"]
    assert "longer than" in result["error"]
    eventually(lambda: ollama.last()["state"] == "closed", seconds=3)  # the job's own limit is 5 s


def test_a_failing_model_is_an_error_of_the_call(ollama: Ollama) -> None:
    ollama.script(status=400, error="no such luck")
    (result,) = answer("tool-calls", toolCallList=[called("ask_model", {"message": "Hi"})])["results"]
    assert result["error"] == "ask_model failed: Ollama (400): no such luck"


@pytest.mark.usefixtures("tools")
def test_a_result_that_is_no_text_is_written_as_json() -> None:
    (result,) = answer("tool-calls", toolCallList=[called("table", {})])["results"]
    assert result["result"] == '{"a": [1]}'


@pytest.mark.usefixtures("tools")
@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ({"name": "echo", "parameters": {"text": "yes"}}, {"result": "said yes"}),
        ({"name": "fail", "parameters": {}}, {"error": "fail failed: the line is dead"}),
        (None, {"error": "There is no tool ''; there is ask_model, echo, fail, slow, table."}),
        ("echo", {"error": "There is no tool ''; there is ask_model, echo, fail, slow, table."}),
    ],
)
def test_the_legacy_function_call_goes_through_the_same_table(
    function: Any, expected: dict[str, Any]
) -> None:
    assert answer("function-call", functionCall=function) == expected


# -- broken envelopes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({}, {}),
        ({"type": None}, {}),
        ({"type": ["tool-calls"]}, {}),
        ({"type": "tool-calls"}, {"results": []}),
        ({"type": "tool-calls", "toolCallList": None}, {"results": []}),
        ({"type": "tool-calls", "toolCallList": [None, 5, "x"]}, {"results": []}),
        ({"type": "status-update", "call": "call-1"}, {}),
    ],
)
def test_a_broken_envelope_is_answered_as_far_as_it_can_be(message: Any, expected: Any) -> None:
    assert job_for(message) == {"status": "success", "vapi_response": expected, "call_id": ""}


@pytest.mark.parametrize("data", [None, [], "x", {}, {"message": None}, {"message": []}, {"message": 5}])
def test_a_webhook_without_a_message_is_a_one_line_error(data: Any) -> None:
    done = handler({"input": {"type": "vapi_webhook", "webhook_data": data}})
    assert done["status"] == "error" and '"webhook_data" must be' in done["error"]


def test_call_id_is_the_calls_or_the_one_beside_the_message() -> None:
    assert job_for({"type": "hang"}, call_id="c-2")["call_id"] == "c-2"
    assert job_for({"type": "hang", "call": CALL}, call_id="c-2")["call_id"] == "call-1"
    assert job_for({"type": "hang", "call": {"id": 5}}, call_id=None)["call_id"] == ""


types = st.sampled_from([*rp_handler.VAPI_MESSAGES, *TOLD])
fields = st.sampled_from(
    ["call", "toolCallList", "functionCall", "endedReason", "startedAt", "endedAt", "call_id"]
)
one_call = st.dictionaries(st.sampled_from(["id", "type", "name", "function", "arguments"]), json_values)
envelopes = st.builds(
    lambda kind, rest: {**rest, "type": kind},
    types | json_values,
    st.dictionaries(fields, json_values | st.lists(one_call, max_size=3)),
)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(message=envelopes | json_values, call_id=json_values)
def test_any_envelope_gets_one_well_formed_answer(ollama: Ollama, message: Any, call_id: Any) -> None:
    done = job_for(message, call_id=call_id)
    if done["status"] == "success":
        assert set(done) == {"status", "vapi_response", "call_id"} and isinstance(done["call_id"], str)
    else:
        assert set(done) == {"status", "error"} and "\n" not in done["error"]
        assert "please report" not in done["error"], "a defect reached the last resort"
    json.dumps(done, ensure_ascii=False, allow_nan=False).encode()


# -- the relay ----------------------------------------------------------------------------------

SERVE = """
import http from "node:http";
import relay from %r;
http.createServer(async (asked, answer) => {
  const parts = [];
  for await (const part of asked) parts.push(part);
  const request = new Request("http://relay" + asked.url, {
    method: "POST", headers: asked.headers, body: Buffer.concat(parts),
  });
  const response = await relay.fetch(request, process.env);
  answer.writeHead(response.status, Object.fromEntries(response.headers));
  answer.end(await response.text());
}).listen(%d, "127.0.0.1");
"""


class Relay:
    def __init__(self, port: int):
        self.url = f"http://127.0.0.1:{port}"

    def post(self, message: Any, secret: str = "s3cret") -> requests.Response:
        headers = {"X-Vapi-Secret": secret}
        return requests.post(self.url, json={"message": message}, headers=headers, timeout=30)

    def listens(self) -> bool:
        try:
            return self.post({"type": "hang"}, secret="wrong").status_code == 401
        except requests.ConnectionError:
            return False


@contextlib.contextmanager
def relaying(endpoint: Endpoint, folder: Path) -> Iterator[Relay]:
    """The relay in Node, in front of `endpoint`."""
    node = shutil.which("node")
    if not node or int(subprocess.check_output([node, "-p", "parseInt(process.versions.node)"])) < 18:
        pytest.skip("the relay needs Node 18 or newer")
    shutil.copy(TESTS / "relay.js", folder / "relay.mjs")
    port = free_port()
    script = folder / "serve.mjs"
    script.write_text(SERVE % ("./relay.mjs", port))
    env = {**os.environ, "VAPI_SECRET": "s3cret", "RUNPOD_API_KEY": "key", "RUNPOD_URL": endpoint.url}
    process = subprocess.Popen([node, str(script)], env=env)
    try:
        relay = Relay(port)
        eventually(relay.listens)
        yield relay
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def relayed(
    scripted_server: Ollama, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Relay, Endpoint]]:
    with Endpoint(poll=1, api_key="key") as endpoint, endpoint.worker(env={}) as worker:
        worker.wait_ready()
        with relaying(endpoint, tmp_path_factory.mktemp("relay")) as relay:
            yield relay, endpoint


def test_the_relay_answers_before_vapi_gives_up(tmp_path: Path) -> None:
    with Endpoint(api_key="key") as no_worker, relaying(no_worker, tmp_path) as relay:
        started = time.monotonic()
        response = relay.post({"type": "assistant-request"})
        assert response.status_code == 200 and "No answer in time" in response.json()["error"]
        assert time.monotonic() - started < 7.5


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"type": "campaign.predial"}, {"eligible": True}),
        ({"type": "status-update", "call": CALL}, {}),
        (
            {"type": "tool-calls", "toolCallList": [called("nope", {})]},
            {
                "results": [
                    {
                        "toolCallId": "tc-1",
                        "name": "nope",
                        "error": "There is no tool 'nope'; there is ask_model.",
                    }
                ]
            },
        ),
    ],
)
def test_the_relay_answers_vapi_with_http_200(
    relayed: tuple[Relay, Endpoint], message: Any, expected: dict[str, Any]
) -> None:
    response = relayed[0].post(message)
    assert (response.status_code, response.json()) == (200, expected)


def test_the_relay_makes_an_assistant_of_the_endpoint(relayed: tuple[Relay, Endpoint]) -> None:
    assistant = relayed[0].post({"type": "assistant-request"}).json()["assistant"]
    assert assistant["model"]["url"].endswith("/openai/v1")


def test_the_relay_passes_a_failed_jobs_error_on(relayed: tuple[Relay, Endpoint]) -> None:
    response = relayed[0].post(5)
    assert response.status_code == 200 and '"webhook_data" must be' in response.json()["error"]


def test_the_relay_refuses_a_wrong_secret(relayed: tuple[Relay, Endpoint]) -> None:
    assert relayed[0].post({"type": "hang"}, secret="guess").status_code == 401


def test_the_relay_answers_an_error_when_the_endpoint_does_not(relayed: tuple[Relay, Endpoint]) -> None:
    relay, endpoint = relayed
    endpoint.platform.api_key = "another"
    try:
        response = relay.post({"type": "hang"})
        assert response.status_code == 200 and set(response.json()) == {"error"}
    finally:
        endpoint.platform.api_key = "key"


def test_the_readme_shows_the_relay_as_it_is_tested() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    assert (TESTS / "relay.js").read_text() in readme
