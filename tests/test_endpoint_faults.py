"""The faults of the tests' own endpoint, from the side of whoever meets them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from conftest import eventually
from endpoint import CHANNELS, FAULTS, Endpoint


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with Endpoint(poll=0.1) as endpoint:
        yield endpoint


def call(
    endpoint: Endpoint, channel: str, body: str = '{"output": 1}', timeout: float = 0.5
) -> requests.Response:
    if channel in ("job-stream", "job-done"):
        job = next(iter(endpoint.jobs))
        return requests.post(f"{endpoint.url}/{channel}/pod/{job}", data=body, timeout=timeout)
    return requests.get(f"{endpoint.url}/{channel}/pod", timeout=timeout)


def seen(endpoint: Endpoint, channel: str) -> str | int:
    """What a call's client makes of it: a fault's kind or a status."""
    try:
        answer = call(endpoint, channel)
    except requests.ReadTimeout:
        return "stall"
    except requests.ConnectionError as error:
        assert "Connection reset by peer" in str(error)
        return "reset"
    return "html" if "<html>" in answer.text else answer.status_code


@pytest.mark.parametrize("channel", CHANNELS)
def test_a_call_meets_its_fault_and_does_nothing(endpoint: Endpoint, channel: str) -> None:
    job = endpoint.jobs[endpoint.run("Hi")]
    if channel != "job-take":
        call(endpoint, "job-take")
    status = job.status
    endpoint.faults(channel, FAULTS)
    assert [seen(endpoint, channel) for _ in FAULTS] == FAULTS
    assert endpoint.met == {(channel, kind): 1 for kind in FAULTS}
    assert len(endpoint.calls[channel]) == len(FAULTS)
    assert (job.status, job.posts, job.chunks, job.answers) == (status, [], [], 0)
    assert seen(endpoint, channel) in (200, 204)
    assert job.status == ("COMPLETED" if channel == "job-done" else "IN_PROGRESS")
    assert [output for _, output in job.chunks] == [1] * (channel == "job-stream")


def test_a_stall_may_be_bounded_and_a_call_between_two_faults_spared(endpoint: Endpoint) -> None:
    endpoint.faults("ping", ["stall", None, "reset"], stall=0.2)
    begin = time.monotonic()
    assert seen(endpoint, "ping") == "reset" and time.monotonic() - begin >= 0.2
    assert [seen(endpoint, "ping") for _ in range(3)] == [200, "reset", 200]


def test_a_storm_is_repeated_by_its_seed_and_ends(endpoint: Endpoint) -> None:
    storms = []
    for _ in range(2):
        endpoint.storm(7, {"ping": 0.5}, stall=0)
        storms.append([seen(endpoint, "ping") for _ in range(30)])
    assert storms[0] == storms[1] and 5 < storms[0].count(200) < 25
    endpoint.calm()
    assert [seen(endpoint, "ping") for _ in range(10)] == [200] * 10


@pytest.mark.parametrize(("channel", "limit"), [("job-stream", 1_000_000), ("job-done", 20_000_000)])
def test_a_post_above_its_limit_is_refused(endpoint: Endpoint, channel: str, limit: int) -> None:
    endpoint.run("Hi")
    call(endpoint, "job-take")
    frame = len(json.dumps({"output": ""}))
    for size, status in [(limit - frame + 1, 413), (limit - frame, 200)]:
        assert call(endpoint, channel, json.dumps({"output": "x" * size}), 10).status_code == status


def test_open_long_polls_are_seen_with_what_they_ask_for(endpoint: Endpoint) -> None:
    endpoint.platform.poll = 0.5
    endpoint.faults("job-take", ["stall"], stall=0.5)
    url = f"{endpoint.url}/job-take-batch/pod?batch_size=3"
    with ThreadPoolExecutor() as pool:
        for _ in range(2):  # one that stalls, and one that is held
            poll = pool.submit(requests.get, url, timeout=5)
            eventually(lambda: "pod" in endpoint.platform.pods)
            eventually(lambda: endpoint.platform.pods["pod"].polls == [3])
            poll.exception(5)
            eventually(lambda: endpoint.platform.pods["pod"].polls == [])
    assert len(endpoint.calls["job-take"]) == 2


def test_malformed_entries_are_handed_over_as_they_are(endpoint: Endpoint) -> None:
    raw = ["bare", {"input": "no id"}, None, {"id": "good", "input": 1}]
    assert endpoint.offer(raw)[3] == "good"
    batch = requests.get(f"{endpoint.url}/job-take-batch/pod?batch_size=9", timeout=5).json()
    assert batch == raw
