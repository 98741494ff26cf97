"""Nothing lost on a bad network, no place lost, no worker that only looks alive: fault by fault.

test_storm.py has them all at once.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from conftest import TESTS, WORKER, eventually, own_host
from endpoint import HANDLER, Endpoint, Job
from test_life import ENDLESS, MODEL, STREAM, Worked, working

import rp_handler
from rp_handler import handler

WORDS = [f"{number} " for number in range(60)]


@pytest.fixture(scope="module")
def shared() -> Iterator[Worked]:
    with working({"tokens": WORDS, "interval_ms": 5}, REQUEST_TIMEOUT="60") as worked:
        yield worked


@pytest.fixture
def worked(shared: Worked) -> Iterator[Worked]:
    shared.control("script", tokens=WORDS, interval_ms=5)
    requests.post(f"http://{shared.host}/test/clear", timeout=5)
    yield shared
    shared.endpoint.calm()


def spoken(job: Job) -> str:
    frames = "".join(str(output) for _, output in job.chunks).split("\n\n")
    chunks = [json.loads(frame[6:]) for frame in frames if frame.startswith("data: {")]
    return "".join(choice["delta"].get("content") or "" for c in chunks for choice in c["choices"])


# -- delivery -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["reset", 408, 425, 429, 500, 503, "html", "stall"])
def test_a_chunk_and_a_result_that_meet_a_fault_are_posted_again_in_order(
    worked: Worked, fault: str | int
) -> None:
    worked.endpoint.faults("job-stream", [None, fault, None, fault])
    worked.endpoint.faults("job-done", [fault])
    job = worked.endpoint.wait(worked.endpoint.run(STREAM), 60)
    assert (job.status, job.answers) == ("COMPLETED", 1)
    assert spoken(job) == "".join(WORDS)
    assert worked.endpoint.met["job-done", fault] >= 1


@pytest.mark.parametrize(
    ("refusals", "why", "seconds"),
    [([404], "404", 0), ([503] * 100, "503", 24)],
    ids=["at once", "in the end"],
)
def test_a_stream_whose_chunk_cannot_be_delivered_stops_and_fails(
    worked: Worked, refusals: list[int], why: str, seconds: float
) -> None:
    worked.control("script", repeat=-1, interval_ms=5)
    worked.endpoint.faults("job-stream", [None, *refusals])
    endless = {**STREAM, "openai_input": {**STREAM["openai_input"], "max_tokens": 100_000}}  # type: ignore[dict-item]
    job = worked.endpoint.wait(worked.endpoint.run(endless), 60)
    assert job.status == "FAILED" and f"did not take what came of the job ({why})" in job.error
    assert job.taken and job.done and job.done - job.taken >= seconds, "given up too early"
    assert f"{job.id} | error: a chunk could not be delivered. " in worked.worker.log
    eventually(lambda: worked.generations()[-1]["state"] == "closed")


def test_a_whole_object_is_not_lost_where_its_copy_on_the_stream_is_refused(worked: Worked) -> None:
    worked.control("script", tokens=["x" * 1_200_000])
    job = worked.endpoint.wait(worked.endpoint.run({"message": "Hi"}))
    assert job.status == "COMPLETED" and len(job.output[0]["response"]) == 1_200_000


def test_a_result_that_is_too_large_ends_the_job_in_words(worked: Worked) -> None:
    worked.control("script", tokens=["x" * 1_000_000] * 21)
    job = worked.endpoint.wait(worked.endpoint.run({"message": "Hi"}))
    assert job.status == "FAILED" and "(413)" in job.error


def test_a_result_that_cannot_be_delivered_is_a_line_in_the_log(worked: Worked) -> None:
    worked.endpoint.faults("job-done", [400])
    job = worked.endpoint.run({"message": "Hi"})
    line = rf"^{job} \| error: the result could not be delivered\. .*\(400\)"
    eventually(lambda: re.search(line, worked.worker.log, re.MULTILINE))


# -- cancels ------------------------------------------------------------------------------------


def test_a_cancel_at_any_moment_gives_the_place_back() -> None:
    with working({"repeat": -1, "interval_ms": 20}) as worked:
        for turn in range(200):
            job = worked.endpoint.run(STREAM if turn % 2 else ENDLESS)
            if turn % 3:
                eventually(lambda job=job: worked.endpoint.jobs[job].taken)  # type: ignore[misc]
            time.sleep(turn % 40 / 400)
            worked.endpoint.cancel(job)
        eventually(lambda: worked.worker.pod.polls == [8], worker=worked.worker)
        assert worked.worker.log.count("defect") == 0
        eventually(lambda: not {seen["state"] for seen in worked.generations()} & {"running", "queued"})
        worked.worker.terminate()
        assert worked.ends(5) == 0


def test_a_job_whose_id_was_stopped_before_runs_when_it_comes_again(worked: Worked) -> None:
    job = f"retried-{time.time()}"
    pod, calls = worked.worker.pod, worked.endpoint.calls["job-stop"]
    worked.endpoint.in_loop(pod.stops.append, job)
    worked.endpoint.in_loop(pod.bell.ring)
    eventually(lambda: not pod.stops)
    told = len(calls)
    eventually(lambda: len(calls) > told)  # it polls again once it has read the answer
    worked.endpoint.offer([{"id": job, "input": {"message": "Hi"}}])
    assert worked.endpoint.wait(job).status == "COMPLETED"


def test_a_job_that_is_handed_over_twice_runs_once(worked: Worked) -> None:
    worked.control("script", repeat=100, interval_ms=20)
    job = worked.endpoint.run({"message": "Hi"})
    worked.running()
    worked.endpoint.requeue(job)
    done = worked.endpoint.wait(job)
    assert (done.status, done.answers, len(worked.generations())) == ("COMPLETED", 1, 1)


# -- servers that hang, die and do not come back ------------------------------------------------


def test_a_server_that_hangs_is_killed_and_started_again() -> None:
    with working(REQUEST_TIMEOUT="1.5") as worked:
        server = worked.state()["pid"]
        os.kill(server, signal.SIGSTOP)
        done = worked.endpoint.runsync({"message": "Hi"})
        assert done["status"] == "FAILED" and "REQUEST_TIMEOUT=1.5" in done["error"]
        waiting = worked.endpoint.run({"message": "Hi"})
        assert worked.endpoint.wait(waiting, 60).status == "COMPLETED", (
            "its time ran out before the server was back"
        )
        assert worked.state()["pid"] != server
        assert "hangs and is killed" in worked.worker.log


@pytest.mark.parametrize("job", [{"message": "Hi"}, STREAM])
def test_a_model_that_hangs_under_a_living_server_is_found_out(job: dict[str, Any]) -> None:
    with working(REQUEST_TIMEOUT="1.5") as worked:
        server = worked.state()["pid"]
        worked.control("script", hang_after=0)
        assert worked.endpoint.wait(worked.endpoint.run(job)).status == "FAILED"
        waiting = worked.endpoint.run({"message": "Hi"})
        eventually(lambda: worked.state().get("pid", server) != server, 40)
        assert worked.endpoint.wait(waiting, 60).status == "COMPLETED", (
            "its time ran out before the server was back"
        )


def test_a_stream_that_thinks_until_its_limit_is_no_reason_to_ask() -> None:
    thinks = {"thinking": "word " * 4000, "interval_ms": 20}
    thinks["capabilities"] = {"llama3:latest": ["completion", "thinking"]}
    with working(thinks, REQUEST_TIMEOUT="1.5") as worked:
        done = worked.endpoint.runsync({"message": "Hi", "think": True, "stream": True})
        assert "REQUEST_TIMEOUT" in done["error"]
        worked.control("script", tokens=["Hello"])
        assert worked.endpoint.runsync({"message": "Hi"})["status"] == "COMPLETED"
        paths = [seen["path"] for seen in worked.control("requests")]
        assert paths.count("/api/generate") == 1, "more than the load"


def test_a_server_that_is_only_slow_is_never_ended() -> None:
    with working(REQUEST_TIMEOUT="1.5") as worked:
        server = worked.state()["pid"]
        worked.control("script", repeat=-1, first_ms=3000, interval_ms=400)
        for _ in range(2):
            asked = [worked.endpoint.run({"message": "Hi"}) for _ in range(8)]
            jobs = [worked.endpoint.wait(job, 60) for job in asked]
            assert ["REQUEST_TIMEOUT" in job.error for job in jobs] == [True] * 8
        worked.control("script", times=0)
        assert worked.endpoint.runsync({"message": "Hi"}, timeout=60)["status"] == "COMPLETED"
        assert worked.state()["pid"] == server


def test_a_job_on_its_way_as_the_server_dies_is_not_lost() -> None:
    with working() as worked:
        worked.endpoint.platform.way = 0.5
        job = worked.endpoint.run({"message": "Hi"})
        eventually(lambda: worked.endpoint.jobs[job].taken)
        worked.kill_server()
        assert worked.endpoint.wait(job).status == "COMPLETED"


@contextlib.contextmanager
def failing_later(folder: Path, how: str, **environment: Any) -> Iterator[Worked]:
    """A worker whose `ollama serve` fails in the way `how` says once the file `broken` is there."""
    ollama = folder / "ollama"
    ollama.write_text(f'#!/bin/sh\n[ -e {folder}/broken ] && {how}\nexec {TESTS}/ollama "$@"\n')
    ollama.chmod(0o755)
    with working(PATH=f"{folder}:{os.environ['PATH']}", **environment) as worked:
        (folder / "broken").touch()
        yield worked


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (
            "{ echo 'Error: no space left on device'; exit 1; }",
            "before it answered: Error: no space left",
        ),
        ("exec sleep 600", "STARTUP_TIMEOUT=8 s"),
    ],
)
def test_a_restart_that_fails_or_hangs_ends_the_worker_with_the_reason(
    tmp_path: Path, how: str, words: str
) -> None:
    with failing_later(tmp_path, how, STARTUP_TIMEOUT="8") as worked:
        os.kill(worked.state()["pid"], signal.SIGKILL)
        eventually(lambda: "ended with -9" in worked.worker.log)
        late = worked.endpoint.run({"message": "Hi"})
        worked.endpoint.run({"message": "Hi"})
        assert worked.ends() == 1
        assert re.search(f"^error: .*{words}", worked.worker.log, re.MULTILINE)
        assert worked.endpoint.status(late)["status"] in ("IN_QUEUE", "FAILED")
        assert unhealthy(worked)["reason"] in worked.worker.log
        assert not [line for line in worked.worker.log.splitlines() if line.endswith("in 0.4 s")]


def test_a_server_that_fails_for_good_after_sigterm_leaves_no_job_without_an_answer(
    tmp_path: Path,
) -> None:
    with failing_later(tmp_path, "exit 1") as worked:
        worked.control("script", first_ms=60_000)
        job = worked.endpoint.run({"message": "Hi"})
        worked.running()
        worked.worker.terminate()
        eventually(lambda: "stopping: " in worked.worker.log)
        os.kill(worked.state()["pid"], signal.SIGKILL)
        code = worked.ends()
        done = worked.endpoint.status(job)
        assert done["status"] == "FAILED", worked.worker.log
        assert code == 1, (done, worked.worker.log)


def test_a_second_signal_ends_a_worker_whose_server_has_failed_for_good(tmp_path: Path) -> None:
    with failing_later(tmp_path, "exit 1") as worked:
        worked.control("script", first_ms=60_000)
        worked.endpoint.run({"message": "Hi"})
        worked.running()
        worked.endpoint.faults("job-done", ["reset"] * 100)
        os.kill(worked.state()["pid"], signal.SIGKILL)
        eventually(lambda: "stopping: " in worked.worker.log)
        worked.worker.terminate()
        assert worked.ends(10) == 1 and "error: a second signal" in worked.worker.log


def test_a_server_of_somebody_elses_that_took_the_place_of_its_own_is_not_for_the_worker_to_end(
    tmp_path: Path,
) -> None:
    listed = f"until {TESTS}/ollama list; do sleep 0.1; done"
    other = f"{{ setsid {TESTS}/ollama serve & {listed}; sleep 1; exit 1; }}"
    with failing_later(tmp_path, other, REQUEST_TIMEOUT="1.5") as worked:
        os.kill(worked.state()["pid"], signal.SIGKILL)
        eventually(lambda: "ended with 1" in worked.worker.log, 20)
        worked.control("script", hang_after=0)
        assert "REQUEST_TIMEOUT" in worked.endpoint.runsync({"message": "Hi"})["error"]
        worked.control("script", tokens=["Hello"])
        done = worked.endpoint.wait(worked.endpoint.run({"message": "Hi"}))
        assert done.status == "COMPLETED"


def test_a_server_that_says_much_before_it_answers_does_not_block(tmp_path: Path) -> None:
    ollama = tmp_path / "ollama"
    ollama.write_text(f'#!/bin/sh\nhead -c 300000 /dev/zero\necho\nexec {TESTS}/ollama "$@"\n')
    ollama.chmod(0o755)
    with working(PATH=f"{tmp_path}:{os.environ['PATH']}", STARTUP_TIMEOUT="20") as worked:
        assert worked.endpoint.runsync({"message": "Hi"})["status"] == "COMPLETED"


def unhealthy(worked: Worked) -> dict[str, str]:
    (report,) = [ping for ping in worked.worker.pings if ping.get("status") == "unhealthy"]
    return report


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"PATH": "/nowhere"}, "`ollama` is not on PATH"),
        ({"OLLAMA_SCRIPT": '{"start_error": "no space left"}'}, "no space left"),
        ({"OLLAMA_SCRIPT": json.dumps({**MODEL, "load_error": "out of memory"})}, "out of memory"),
        (
            {"OLLAMA_SCRIPT": json.dumps({**MODEL, "load_ms": 60_000}), "STARTUP_TIMEOUT": "5"},
            "STARTUP_TIMEOUT=5",
        ),
    ],
)
def test_the_platform_hears_why_a_start_failed(environment: Any, words: str) -> None:
    with working(ready=False, **environment) as worked:
        assert worked.ends() == 1
        assert words in unhealthy(worked)["reason"]


# -- a port that is taken -----------------------------------------------------------------------


class NotOllama(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, *_: Any) -> None:
        pass


def web_server() -> Any:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), NotOllama)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server.socket


def silent_server() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0))


def trickling_server() -> socket.socket:
    listener = silent_server()

    def trickle() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=drip, args=(connection,), daemon=True).start()

    def drip(connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while connection.send(b"H"):
                time.sleep(0.05)

    threading.Thread(target=trickle, daemon=True).start()
    return listener


@pytest.mark.parametrize("other", [web_server, silent_server, trickling_server])
def test_another_program_on_the_port_is_named(other: Callable[[], Any], store: str) -> None:
    taken = other()
    host = f"127.0.0.1:{taken.getsockname()[1]}"
    env = {**os.environ, "OLLAMA_HOST": host, "OLLAMA_MODELS": store}
    done = subprocess.run(
        [*WORKER, "--test_input", '{"input": {"message": "Hi"}}'],
        env=env, capture_output=True, text=True, timeout=20,
    )  # fmt: skip
    taken.close()
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert f"{host} is taken by something that is not Ollama" in line


def test_an_address_that_ollama_cannot_bind_is_told_in_its_words(store: str) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and does not listen
        host = f"127.0.0.1:{bound.getsockname()[1]}"
        env = {**os.environ, "OLLAMA_HOST": host, "OLLAMA_MODELS": store}
        done = subprocess.run(
            WORKER, env=env, capture_output=True, text=True, cwd=TESTS.parent, timeout=30
        )
    assert done.returncode == 1 and "address already in use" in done.stderr


# -- taking jobs --------------------------------------------------------------------------------


def test_no_long_poll_is_open_while_all_places_are_taken(worked: Worked) -> None:
    worked.control("script", repeat=-1, interval_ms=50)
    jobs = worked.endpoint.offer([{"id": f"full-{n}-{time.time()}", "input": ENDLESS} for n in range(8)])
    worked.running(8)
    assert worked.worker.pod.polls == []
    before = len(worked.endpoint.calls["job-take"])
    late = worked.endpoint.run({"message": "Hi"})
    worked.endpoint.cancel(jobs[0])
    eventually(lambda: worked.endpoint.jobs[late].taken)
    assert len(worked.endpoint.calls["job-take"]) == before + 1
    for job in [*jobs, late]:
        worked.endpoint.cancel(job)
    eventually(lambda: not {seen["state"] for seen in worked.generations()} & {"running", "queued"})


@pytest.mark.parametrize("fault", [500, 429])
def test_a_job_take_that_fails_is_tried_again_after_a_growing_pause(
    worked: Worked, fault: str | int
) -> None:
    log = len(worked.worker.log)
    calls = worked.endpoint.calls["job-take"]
    before = len(calls)
    worked.endpoint.faults("job-take", [fault] * 5)
    worked.endpoint.runsync({"message": "Hi"}, timeout=1)  # ends the poll that is open
    eventually(lambda: len(calls) > before + 5, 30)
    pauses = [later - sooner for sooner, later in pairwise(calls[-6:])]
    assert all(later > 1.4 * sooner for sooner, later in pairwise(pauses)) and pauses[0] > 0.15
    assert len(worked.worker.log) - log < 2000


def test_a_job_take_that_is_answered_with_html_is_not_asked_for_without_a_pause(worked: Worked) -> None:
    calls = worked.endpoint.calls["job-take"]
    before = len(calls)
    worked.endpoint.faults("job-take", ["html"] * 5)
    worked.endpoint.runsync({"message": "Hi"}, timeout=1)  # ends the poll that is open
    eventually(lambda: len(calls) > before + 5, 30)
    assert min(later - sooner for sooner, later in pairwise(calls[-6:])) > 0.15


def test_a_batch_with_malformed_entries_runs_the_others(worked: Worked) -> None:
    worked.endpoint.runsync({"message": "Hi"})
    good = {"id": f"good-{time.time()}", "input": {"message": "Hi"}}
    bare = {"id": f"bare-{time.time()}"}
    worked.endpoint.offer([{"input": {"message": "Hi"}}, "a text", None, {"id": 5}, bare, good])
    assert worked.endpoint.wait(good["id"]).status == "COMPLETED"  # type: ignore[arg-type]
    assert 'needs an "input"' in worked.endpoint.wait(bare["id"]).error
    assert worked.worker.log.count("a job without an id") >= 4


# -- words and lines ----------------------------------------------------------------------------


def test_a_defect_is_placed_in_the_workers_own_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rp_handler, "chat_messages", lambda _: json.loads("{"))
    error = handler({"id": "job-1", "input": {"message": "Hi"}})["error"]
    found = re.search(r"JSONDecodeError in line (\d+)\); please report it", error)
    assert found and "chat_messages(" in HANDLER.read_text().splitlines()[int(found[1]) - 1]


def test_each_line_of_the_log_is_whole(worked: Worked) -> None:
    before = len(worked.worker.log)
    worked.control("script", tokens=["Hi"])
    with ThreadPoolExecutor(8) as pool:
        assert len(list(pool.map(worked.endpoint.runsync, [{"message": "Hi"}] * 200))) == 200
    lines = worked.worker.log[before:].splitlines()
    jobs = [line for line in lines if re.fullmatch(r"sync-[\w-]+ \| kind=chat .* tokens=1", line)]
    assert len(jobs) == 200 == len([line for line in lines if "kind=" in line])


def test_an_error_never_holds_the_words_of_a_server_that_died(tmp_path: Path) -> None:
    with failing_later(tmp_path, "exit 7") as worked:
        worked.control("script", stderr="a caller's zebra")
        worked.endpoint.runsync({"message": "Hi"})
        os.kill(worked.state()["pid"], signal.SIGKILL)
        assert worked.ends() == 1
        assert "ended with 7 before it answered" in worked.worker.log
        assert "zebra" not in worked.worker.log


# -- endings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_model_loads_is_no_error(signum: signal.Signals) -> None:
    with working({"load_ms": 60_000}, ready=False) as worked:
        eventually(lambda: worked.state().get("pid"))
        worked.worker.process.send_signal(signum)
        assert worked.ends(10) == 0, worked.worker.log
        assert "error" not in worked.worker.log and "Traceback" not in worked.worker.log


def test_a_death_of_the_server_leaves_no_zombie_and_no_open_file() -> None:
    with own_host() as host, Endpoint(poll=1) as endpoint:
        # One that adopts orphans, as the first process does (PR_SET_CHILD_SUBREAPER), and whose files
        # are not closed by the garbage collector's luck.
        script = (
            "import ctypes, gc, runpy, sys; ctypes.CDLL(None).prctl(36, 1); gc.disable(); "
            f"sys.argv = ['rp_handler.py']; runpy.run_path({str(HANDLER)!r}, run_name='__main__')"
        )
        env = {"OLLAMA_HOST": host, "OLLAMA_SCRIPT": json.dumps(MODEL)}
        with endpoint.worker(env=env, args=[script], script="-c") as worker:
            worker.wait_ready()
            worked, process = Worked(endpoint, worker, host), psutil.Process(worker.pid)

            def files() -> int:
                return process.num_fds() - len(process.net_connections())

            before = files()
            for restarts in (1, 2):
                worked.kill_server()
                eventually(lambda: worker.log.count("ready:") == 1 + restarts)  # noqa: B023
            children = process.children(recursive=True)
            eventually(lambda: all(child.status() != psutil.STATUS_ZOMBIE for child in children))
            eventually(lambda: files() == before)
