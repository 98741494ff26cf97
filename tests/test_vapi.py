"""VAPI's server messages: the exact answer to every type, through `handler` and through the relay."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote

import pytest
import requests
from conftest import PROJECT, TESTS, Ollama, eventually
from endpoint import Endpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_chat import json_values

import rp_handler
from rp_handler import handler

CALL = {"id": "call-1", "orgId": "org-1", "customer": {"number": "+15550100"}}


def event(message: Any, **beside: Any) -> dict[str, Any]:
    job_input = {"type": "vapi_webhook", "webhook_data": {"message": message, **beside}}
    return {"id": "job-1", "input": job_input}


def job_for(message: Any, **beside: Any) -> dict[str, Any]:
    return handler(event(message, **beside))


def answer(kind: str, worker: Callable[..., dict[str, Any]] = handler, **fields: Any) -> Any:
    done = worker(event({"type": kind, "call": CALL, "timestamp": 1795000000000, **fields}))
    assert set(done) == {"status", "vapi_response", "call_id"}, done
    assert done["status"] == "success" and done["call_id"] == "call-1"
    return done["vapi_response"]


def set_up(**settings: str) -> Callable[..., dict[str, Any]]:
    """The handler of a worker that starts with these settings, and with no other of VAPI's."""
    unset = dict.fromkeys(("VAPI_ASSISTANT_ID", "VAPI_TRANSFER_NUMBER", "RUNPOD_ENDPOINT_ID"), "")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**unset, **settings}.items():
            patch.setenv(name, value)
        return runpy.run_path(rp_handler.__file__)["handler"]


# -- messages that need no model ------------------------------------------------------------------

TOLD = """
status-update end-of-call-report hang conversation-update transcript transcript[transcriptType="final"]
speech-update model-output user-interrupted transfer-update voice-input language-change-detected
assistant.started assistant.speechStarted phone-call-control chat.created chat.deleted session.created
session.updated session.deleted call.deleted call.delete.failed call.artifact.upload a-type-yet-to-come
""".split()
ANSWERED: dict[str, dict[str, Any]] = {
    "knowledge-base-request": {"documents": []},
    "call.endpointing.request": {"timeoutSeconds": 0.5},
    "campaign.predial": {"eligible": True},
    **{kind: {} for kind in TOLD},
}
REFUSED = {
    "voice-request": "This worker makes no audio",
    "assistant-request": "No assistant is set up",
    "transfer-destination-request": "There is no number",
    "handoff-destination-request": "There is no assistant",
}
SET: dict[str, dict[str, Any]] = {
    "assistant-request": {"assistantId": "as-1"},
    "transfer-destination-request": {"destination": {"type": "number", "number": "+15550123"}},
    "handoff-destination-request": {"destination": {"type": "assistant", "assistantId": "as-1"}},
}


@pytest.mark.parametrize("kind", ANSWERED)
def test_a_message_is_answered_without_the_model(ollama: Ollama, kind: str) -> None:
    assert answer(kind, messages=[], artifact={"transcript": "private"}) == ANSWERED[kind]
    assert ollama.requests() == []


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_set_up_is_refused_without_the_model(ollama: Ollama, kind: str) -> None:
    said = answer(kind, set_up())
    assert set(said) == {"error"} and said["error"].startswith(REFUSED[kind])
    assert ollama.requests() == []


@pytest.mark.parametrize("kind", SET)
def test_assistant_and_destinations_come_from_the_settings(kind: str) -> None:
    worker = set_up(
        VAPI_TRANSFER_NUMBER="+15550123", VAPI_ASSISTANT_ID="as-1", RUNPOD_ENDPOINT_ID="abc123"
    )
    assert answer(kind, worker) == SET[kind]


def test_assistant_request_makes_an_assistant_that_talks_to_this_endpoint(ollama: Ollama) -> None:
    assert answer("assistant-request", set_up(RUNPOD_ENDPOINT_ID="abc123")) == {
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
        (CALL_ID, {"endedReason": "hangup", "durationSeconds": 15551234567}, "ended: hangup after - s"),
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


def results(*calls: dict[str, Any]) -> list[dict[str, Any]]:
    return list(answer("tool-calls", toolCallList=list(calls))["results"])


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    ended = [threading.Event() for _ in range(5)]

    def fail(**_: Any) -> str:
        raise OSError("the line\nis dead")

    def after_the_next(place: int) -> str:
        assert ended[place + 1].wait(5), "the calls do not run side by side"
        ended[place].set()
        return f"place {place}"

    def give_up() -> str:
        raise asyncio.CancelledError("no answer")

    own: dict[str, Callable[..., Any]] = {
        "echo": lambda text: f"said {text}",
        "fail": fail,
        "look_up": lambda: json.loads("<html>"),
        "leave": lambda: sys.exit("good bye"),
        "give_up": give_up,
        "stuck": lambda: ended[0].wait(10),
        "after_the_next": after_the_next,
        "table": lambda: {"a": [1]},
    }
    monkeypatch.setattr(rp_handler, "TOOLS", {**rp_handler.TOOLS, **own})
    ended[4].set()
    yield
    ended[0].set()


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
    assert results(call) == [{"toolCallId": "tc-1", "name": "echo", "result": "said yes"}]


@pytest.mark.usefixtures("tools")
@pytest.mark.parametrize(
    ("call", "error"),
    [
        (called("nope", {}), "There is no tool 'nope'; there is ask_model, echo"),
        (called("echo", "{not json"), "echo failed: its arguments must be a JSON object"),
        (called("echo", [1]), "echo failed: its arguments must be a JSON object"),
        (called("echo", '"text"'), "echo failed: its arguments must be a JSON object"),
        (called("echo", {"wrong": 1}), "echo failed: .*unexpected keyword argument 'wrong'"),
        (called("echo", None), "echo failed: .*missing"),
        (called("fail", {}), "fail failed: the line is dead"),
        (called("look_up", {}), "look_up failed: Expecting value: line 1"),
        (called("leave", {}), "leave failed: good bye"),
        (called("give_up", {}), "give_up failed: no answer"),
        ({"id": "tc-1"}, "There is no tool ''"),
        ({"id": "tc-1", "function": "echo"}, "There is no tool ''"),
        (called(["x"], {}), "There is no tool ''"),  # type: ignore[arg-type]
    ],
)
def test_a_call_that_fails_is_an_error_for_itself_alone(ollama: Ollama, call: Any, error: str) -> None:
    failed, fine = results(call, called("echo", {"text": "yes"}, "tc-2"))
    assert set(failed) == {"toolCallId", "name", "error"} and failed["toolCallId"] == "tc-1"
    assert re.match(error, failed["error"]) and "\n" not in failed["error"]
    assert fine == {"toolCallId": "tc-2", "name": "echo", "result": "said yes"}
    assert ollama.requests() == [], "the model made an answer up"


@pytest.mark.usefixtures("tools")
def test_calls_run_side_by_side_and_their_results_keep_the_order() -> None:
    calls = [called("after_the_next", {"place": place}, f"id {place}") for place in range(4)]
    got = [(result["toolCallId"], result["result"]) for result in results(*calls)]
    assert got == [(f"id {place}", f"place {place}") for place in range(4)]


@pytest.mark.usefixtures("tools")
def test_a_tool_that_is_too_slow_is_an_error_and_holds_up_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rp_handler, "TOOL_SECONDS", 0.5)
    late, fine = results(called("stuck", {}, "a"), called("echo", {"text": "yes"}, "b"))
    assert late == {"toolCallId": "a", "name": "stuck", "error": "The tool took longer than 0.5 s."}
    assert fine["result"] == "said yes"


def test_the_log_tells_that_a_job_was_cancelled_while_its_tools_ran(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    data = {"message": {"type": "tool-calls", "toolCallList": [called("cancel", {})]}}
    job = rp_handler.Job({"id": "j", "input": {"type": "vapi_webhook", "webhook_data": data}})
    monkeypatch.setattr(rp_handler, "TOOLS", {"cancel": job.stop})
    list(rp_handler.answer(job))
    assert "status=stopped" in capfd.readouterr().err


def test_ask_model_is_answered_through_chat_in_one_line(ollama: Ollama) -> None:
    ollama.script(tokens=["It is\n", "noon."])
    (result,) = results(called("ask_model", {"message": "Time?"}))
    assert result == {"toolCallId": "tc-1", "name": "ask_model", "result": "It is noon."}
    assert ollama.last()["body"]["messages"][-1]["content"] == "Time?"


def test_a_slow_model_stops_generating_when_the_tools_time_is_over(
    ollama: Ollama, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rp_handler, "TOOL_SECONDS", 0.3)
    ollama.script(repeat=-1, interval_ms=20)
    (result,) = results(called("ask_model", {"message": "Talk."}))
    assert "longer than" in result["error"]
    eventually(lambda: ollama.last()["state"] == "closed", seconds=3)  # the job's own limit is 5 s


def test_a_failing_model_is_an_error_of_the_call(ollama: Ollama) -> None:
    ollama.script(status=400, error="no such luck")
    (result,) = results(called("ask_model", {"message": "Hi"}))
    assert result["error"] == "ask_model failed: Ollama (400): no such luck"


NO_TOOL = (
    "There is no tool ''; there is ask_model, echo, fail, look_up, leave, give_up, stuck, "
    "after_the_next, table."
)


@pytest.mark.usefixtures("tools")
@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ({"name": "echo", "parameters": {"text": "yes"}}, {"result": "said yes"}),
        ({"name": "table"}, {"result": '{"a": [1]}'}),
        ({"name": "table", "parameters": " "}, {"result": '{"a": [1]}'}),
        ({"name": "fail", "parameters": {}}, {"error": "fail failed: the line is dead"}),
        (None, {"error": NO_TOOL}),
        ("echo", {"error": NO_TOOL}),
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


def test_what_json_cannot_write_is_replaced() -> None:
    call = {"id": "\udc00", "name": "nope", "arguments": math.nan}
    done = job_for({"type": "tool-calls", "toolCallList": [call]}, call_id="c \ud83d")
    assert (done["call_id"], done["vapi_response"]["results"][0]["toolCallId"]) == ("c ?", "?")


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

RELAY = (TESTS / "relay.js").read_text()
SERVE = """
import http from "node:http";
import relay from "data:text/javascript,%s";
const server = http.createServer(async (asked, answer) => {
  const { method, headers } = asked;
  const body = Buffer.concat(await asked.toArray());
  const request = new Request("http://relay", { method, headers, body });
  const response = await relay.fetch(request, process.env);
  answer.writeHead(response.status, Object.fromEntries(response.headers));
  answer.end(await response.text());
});
server.listen(0, "127.0.0.1", () => console.log(server.address().port));
"""


@contextlib.contextmanager
def relaying(runpod: str, source: str = RELAY) -> Iterator[str]:
    """The address of the relay, which runs in Node in front of the endpoint at `runpod`."""
    node = shutil.which("node")
    if not node or int(subprocess.check_output([node, "-p", "parseInt(process.versions.node)"])) < 18:
        pytest.skip("the relay needs Node 18 or newer")
    command = [node, "--input-type=module", "-e", SERVE % quote(source)]
    variables = {"VAPI_SECRET": "s3cret", "RUNPOD_API_KEY": "key", "RUNPOD_URL": runpod}
    with subprocess.Popen(command, env={**os.environ, **variables}, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


def post(relay: str, body: str, secret: str = "s3cret") -> requests.Response:
    return requests.post(relay, body, headers={"X-Vapi-Secret": secret}, timeout=30)


def tell(relay: str, kind: str, **fields: Any) -> Any:
    """What VAPI gets for a message; always with HTTP 200."""
    response = post(relay, json.dumps({"message": {"type": kind, **fields}}))
    assert response.status_code == 200, response.text
    return response.json()


@pytest.fixture(scope="module")
def relayed(scripted_server: Ollama) -> Iterator[tuple[str, Endpoint]]:
    """A relay, and the endpoint with a real worker behind it."""
    scripted_server.script()
    with Endpoint(poll=1, api_key="key") as endpoint, endpoint.worker() as worker:
        worker.wait_ready()
        with relaying(endpoint.url) as relay:
            yield relay, endpoint


@pytest.fixture(scope="module")
def by_hand() -> Iterator[tuple[str, socket.socket]]:
    """A relay, and the socket on which the test itself is RunPod."""
    with socket.create_server(("127.0.0.1", 0)) as runpod:
        runpod.settimeout(10)
        with relaying(f"http://127.0.0.1:{runpod.getsockname()[1]}") as relay:
            yield relay, runpod


@pytest.mark.parametrize("kind", TOLD)
def test_what_is_only_told_the_relay_answers_without_a_job(
    relayed: tuple[str, Endpoint], kind: str
) -> None:
    relay, endpoint = relayed
    jobs = len(endpoint.jobs)
    assert tell(relay, kind) == {}
    assert len(endpoint.jobs) == jobs


@pytest.mark.parametrize("kind", sorted(rp_handler.VAPI_MESSAGES.keys() - TOLD))
def test_what_wants_an_answer_the_relay_brings_to_the_worker(
    relayed: tuple[str, Endpoint], kind: str
) -> None:
    relay, endpoint = relayed
    fields = {"call": CALL, "toolCallList": [called("nope", {})]}
    said = tell(relay, kind, **fields)
    *_, job = endpoint.jobs.values()
    assert job.input == {"type": "vapi_webhook", "webhook_data": {"message": {"type": kind, **fields}}}
    assert said and said == job.output[0]["vapi_response"]


def test_ended_calls_are_brought_where_their_line_in_the_log_is_wanted(
    relayed: tuple[str, Endpoint],
) -> None:
    (worker,) = relayed[1].workers
    wanted = RELAY.replace("LOG_ENDED_CALLS = false", "LOG_ENDED_CALLS = true")
    with relaying(relayed[1].url, wanted) as relay:
        assert tell(relay, "end-of-call-report", endedReason="hangup") == {}
    assert "ended: hangup" in worker.log


@pytest.mark.parametrize(
    ("secret", "body", "status"),
    [
        ("guess", '{"message": {"type": "hang"}}', 401),
        ("s3cret", '{"message": {}}', 400),
        ("s3cret", '{"message": 5}', 400),
        ("s3cret", "null", 400),
        ("s3cret", "{not json", 400),
        ("s3cret", "", 400),
    ],
)
def test_the_relay_refuses_who_is_not_vapi(
    relayed: tuple[str, Endpoint], secret: str, body: str, status: int
) -> None:
    assert post(relayed[0], body, secret).status_code == status


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        ("200 OK", '{"output": {"vapi_response": {"results": []}}}', {"results": []}),
        ("200 OK", '{"status": "FAILED", "error": "Ollama ended."}', {"error": "Ollama ended."}),
        ("200 OK", '{"id": "a", "status": "IN_PROGRESS"}', {"error": "RunPod: the job is IN_PROGRESS"}),
        ("200 OK", "<html>Welcome</html>", {"error": "RunPod: its answer is not JSON"}),
        ("502 Bad Gateway", "<html>Down</html>", {"error": "RunPod: 502"}),
        ("401 Unauthorized", "", {"error": "RunPod: 401"}),
        ("401 Unauthorized", '{"error": "unauthorized"}', {"error": "RunPod: 401"}),
        ("no status", "", {"error": "RunPod: no connection"}),
    ],
)
def test_the_relay_puts_what_runpod_answers_into_words(
    by_hand: tuple[str, socket.socket], status: str, body: str, said: dict[str, Any]
) -> None:
    relay, runpod = by_hand
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(tell, relay, "tool-calls")
        with runpod.accept()[0] as connection:
            assert connection.recv(65536).startswith(b"POST /runsync?wait=18500 ")  # VAPI waits 20 s
            connection.sendall(f"HTTP/1.1 {status}\r\n\r\n{body}".encode())
            connection.shutdown(socket.SHUT_WR)
            assert asked.result() == said


def test_the_relay_answers_before_vapi_gives_up(by_hand: tuple[str, socket.socket]) -> None:
    relay, runpod = by_hand
    with Endpoint(api_key="key") as no_worker, relaying(no_worker.url) as queue:
        started = time.monotonic()
        with ThreadPoolExecutor() as pool:
            asked = [pool.submit(tell, each, "assistant-request") for each in (queue, relay, relay)]
            with runpod.accept()[0] as silent, runpod.accept()[0] as half:
                assert silent.recv(65536).startswith(b"POST /runsync?wait=6500 ")  # VAPI waits 7.5 s
                half.sendall(b"HTTP/1.1 200 OK\r\n\r\n{")
                said = [each.result()["error"] for each in asked]
        assert said == ["RunPod: the job is IN_QUEUE", *2 * ["RunPod: no answer in time"]]
        assert time.monotonic() - started < 15, "it waits as long as for tool-calls"


def test_the_readme_shows_the_relay_as_it_is_tested() -> None:
    assert RELAY in (PROJECT / "README.md").read_text()
