"""What the SDK's own job loop does to a caller: a test for each line of the table in rp_handler.py.

They run an ordinary handler under an unmended SDK. One that fails is good news: that line, and what
stands in rp_handler.py for it, is no longer needed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import pytest
from conftest import PROJECT, Ollama, eventually, own_host
from endpoint import HANDLER, Endpoint, Worker

ORDINARY = """
import asyncio, runpod
async def handler(job):
    try:
        yield "begun"
        await asyncio.sleep(job["input"].get("seconds", 0))
        yield "done"
    finally:
        print("finally", job["id"], flush=True)
runpod.serverless.start(
    {"handler": handler, "concurrency_modifier": lambda _: 8, "return_aggregate_stream": True}
)
"""


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with Endpoint(poll=5) as endpoint:
        yield endpoint


@pytest.fixture
def unmended(endpoint: Endpoint) -> Iterator[Worker]:
    with endpoint.worker(args=[ORDINARY], script="-c") as worker:
        worker.wait_ready()
        endpoint.runsync({})  # the next poll asks for all places
        yield worker


@pytest.mark.usefixtures("unmended")
def test_half_of_a_burst_waits_a_second(endpoint: Endpoint) -> None:
    burst = endpoint.offer([{"id": f"b-{place}", "input": {"seconds": 1.5}} for place in range(8)])
    begun = [eventually(partial(lambda job: endpoint.jobs[job].chunks, job))[0][0] for job in burst]
    assert max(begun) - min(begun) > 0.7


@pytest.mark.usefixtures("unmended")
def test_a_job_lies_in_the_sdks_queue_before_it_begins(endpoint: Endpoint) -> None:
    waits = []
    for _ in range(10):
        job = endpoint.wait(endpoint.run({}))
        waits.append(job.chunks[0][0] - (job.taken or 0))
    assert median(waits) > 0.02


@pytest.mark.usefixtures("unmended")
@pytest.mark.parametrize("fault", ["reset", 429])
def test_one_fault_leaves_a_hole_in_a_stream_that_completes(
    endpoint: Endpoint, fault: str | int
) -> None:
    endpoint.faults("job-stream", [fault])
    job = endpoint.wait(endpoint.run({}))
    assert job.status == "COMPLETED" and [text for _, text in job.chunks] == ["done"]


def test_one_fault_loses_a_result(endpoint: Endpoint, unmended: Worker) -> None:
    endpoint.faults("job-done", ["reset"])
    job = endpoint.run({})
    eventually(lambda: unmended.log.count("Finished.") == 2)
    assert endpoint.status(job)["status"] == "IN_PROGRESS"


def test_a_cancel_reaches_no_finally_of_the_handler(endpoint: Endpoint, unmended: Worker) -> None:
    job = endpoint.run({"seconds": 60})
    eventually(lambda: endpoint.jobs[job].chunks)
    endpoint.platform.round_trip = 5  # so that the cancel meets the SDK in a POST
    second = endpoint.run({"seconds": 60})
    eventually(lambda: endpoint.jobs[second].posts)
    endpoint.cancel(second)
    eventually(lambda: unmended.log.count("Job stopped.") == 1)
    assert f"finally {second}" not in unmended.log
    endpoint.platform.round_trip = 0


def test_a_cancel_before_the_first_step_keeps_a_place_for_ever() -> None:
    from runpod.serverless.modules.rp_scale import JobScaler

    async def places_taken() -> int:
        scaler, job = JobScaler({"handler": lambda job: job}), {"id": "early", "input": {}}
        scaler.job_progress.add(job)
        scaler.jobs_tasks["early"] = task = asyncio.create_task(scaler.handle_job(None, job))
        await scaler.stop_job("early")
        await asyncio.wait([task])
        try:
            return scaler.job_progress.get_job_count()
        finally:
            scaler.job_progress.clear()

    assert asyncio.run(places_taken()) == 1


def test_a_failed_job_take_is_tried_again_at_once(endpoint: Endpoint, unmended: Worker) -> None:
    before = len(endpoint.calls["job-take"])
    endpoint.faults("job-take", [500] * 100)
    endpoint.runsync({}, timeout=0.1)  # ends the poll that is open
    eventually(lambda: len(endpoint.calls["job-take"]) > before + 60, 20)
    polls = endpoint.calls["job-take"][before + 10 : before + 60]
    assert median(later - sooner for sooner, later in pairwise(polls)) < 0.1


def connections(worker: Worker) -> set[int]:
    """The worker's own ports of those to the endpoint."""
    found = psutil.Process(worker.pid).net_connections("tcp")
    there = [each for each in found if each.raddr and each.raddr.port == worker.endpoint.port]
    return {each.laddr.port for each in there if each.status == psutil.CONN_ESTABLISHED}


@pytest.mark.parametrize("mended", [False, True])
def test_only_where_mended_a_connection_outlasts_the_pause_of_a_caller(
    scripted_server: Ollama, mended: bool
) -> None:
    script: Any = {"script": HANDLER} if mended else {"args": [ORDINARY], "script": "-c"}
    with Endpoint(poll=60) as endpoint, endpoint.worker(**script) as worker:
        worker.wait_ready()
        endpoint.runsync({"message": "Hi"})
        before = connections(worker)
        time.sleep(17)  # a caller who speaks; aiohttp closes what is idle for 15 s
        endpoint.runsync({"message": "Hi"})
        assert (connections(worker) <= before) is mended


def test_a_job_that_its_poll_brings_after_sigterm_never_runs(
    endpoint: Endpoint, unmended: Worker
) -> None:
    unmended.terminate()
    time.sleep(0.5)  # its loop of jobs ends within 0.1 s and says nothing
    job = endpoint.run({})
    eventually(lambda: endpoint.jobs[job].taken)
    unmended.process.wait(30)
    assert endpoint.status(job)["status"] == "IN_PROGRESS"


def test_a_name_that_a_newer_sdk_lacks_is_told_in_one_line(tmp_path: Path) -> None:
    source = PROJECT / "rp_handler.py"
    (tmp_path / "rp_handler.py").write_text(source.read_text().replace("get_stop_signals", "hear_stops"))
    with (
        own_host() as host,
        Endpoint() as endpoint,
        endpoint.worker(env={"OLLAMA_HOST": host}, script=tmp_path / "rp_handler.py") as worker,
    ):
        assert worker.process.wait(30) == 1
        (line,) = [line for line in worker.log.splitlines() if line.startswith("error: ")]
        assert "needs runpod>=1.12,<1.13" in line and "hear_stops" in line
        assert "Traceback" not in worker.log
