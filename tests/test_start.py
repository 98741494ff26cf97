"""The start: the SDK's own checks beside the load, what a check that fails leaves, where the model lies.

The programs of a machine with a GPU, nvidia-smi and the SDK's gpu_test, are small scripts here.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from conftest import PROJECT, TESTS, Ollama, eventually
from test_faults import unhealthy
from test_life import Worked, working

# Python and the tests' Ollama, and no nvidia-smi of the machine that runs the tests.
BARE = os.pathsep.join([str(TESTS), str(Path(sys.executable).parent)])


def path_with(folder: Path, programs: dict[str, str]) -> str:
    for name, script in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    return f"{folder}{os.pathsep}{BARE}"


# -- the SDK's own checks -----------------------------------------------------------------------

# Says that it was asked, and answers once the test opens it.
GATE = ': > "$0.asked"; until [ -e "$0.open" ]; do /bin/sleep 0.05; done'
PROGRAMS = {
    "gpu_test": f"{GATE}; echo 'Found 1 GPUs:'; echo 'GPU 0 memory allocation test passed.'",
    "nvidia-smi": f"""
        case "$*" in
        "") echo "NVIDIA-SMI 550.54 CUDA Version: 12.4" ;;
        -L) {GATE}; echo "GPU 0: NVIDIA L4" ;;
        *) exit 9 ;;
        esac""",
}
# The SDK connects to 8.8.8.8 to see whether there is a network.
NETWORK = """import asyncio
connect = asyncio.open_connection
asyncio.open_connection = lambda host, port: connect("127.0.0.1", {port})
"""


@contextlib.contextmanager
def checked(folder: Path, **environment: str) -> Iterator[Worked]:
    """A worker on a machine with a GPU, whose SDK makes all its checks."""
    with socket.create_server(("127.0.0.1", 0)) as network:
        (folder / "sitecustomize.py").write_text(NETWORK.format(port=network.getsockname()[1]))
        machine = {
            "PATH": path_with(folder, PROGRAMS),
            "PYTHONPATH": str(folder),
            "RUNPOD_BINARY_GPU_TEST_PATH": str(folder / "gpu_test"),
            "RUNPOD_MIN_MEMORY_GB": "0.1",
            "RUNPOD_MIN_DISK_PERCENT": "0.1",
            "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "",
            "RUNPOD_SKIP_GPU_CHECK": "",
        }
        with working({"gpu_share": 1}, ready=False, **{**machine, **environment}) as worked:
            yield worked


@pytest.mark.parametrize(
    ("first", "done", "last"),
    [("gpu_test", "CUDA version check passed", "nvidia-smi"), ("nvidia-smi", "ready: ", "gpu_test")],
)
def test_checks_run_beside_the_load_and_no_job_is_taken_before_both_are_done(
    tmp_path: Path, first: str, done: str, last: str
) -> None:
    with checked(tmp_path) as worked:
        job = worked.endpoint.run({"message": "Hi"})
        for program in PROGRAMS:  # that of the load and that of a check, both under way at once
            eventually((tmp_path / f"{program}.asked").exists, 30, worked.worker)
        (tmp_path / f"{first}.open").touch()
        eventually(lambda: done in worked.worker.log, 30, worked.worker)
        with pytest.raises(TimeoutError):
            worked.worker.wait_ready(0.5)
        (tmp_path / f"{last}.open").touch()
        assert worked.endpoint.wait(job).status == "COMPLETED"
        assert "Network connectivity passed" in worked.worker.log


@pytest.mark.parametrize(
    ("check", "environment", "words"),
    [
        ("_gpu_health_check", {"RUNPOD_BINARY_GPU_TEST_PATH": "/bin/false"}, "GPU health check failed"),
        ("_memory_check", {"RUNPOD_MIN_MEMORY_GB": "1e6"}, "Insufficient memory"),
        ("_disk_check", {"RUNPOD_MIN_DISK_PERCENT": "101"}, "Insufficient disk space"),
        ("_network_check", {"RUNPOD_NETWORK_CHECK_TIMEOUT": "0"}, "Network connectivity failed"),
        ("_cuda_version_check", {"RUNPOD_MIN_CUDA_VERSION": "99.0"}, "CUDA version too old: 12.4"),
    ],
)
def test_a_check_that_fails_ends_the_worker_with_its_server_and_is_reported(
    tmp_path: Path, check: str, environment: dict[str, str], words: str
) -> None:
    for program in PROGRAMS:
        (tmp_path / f"{program}.open").touch()
    with checked(tmp_path, **environment) as worked:
        assert worked.ends() == 1
        report = unhealthy(worked)
        assert report["check"] == check and words in report["reason"]
        assert words in worked.worker.log and worked.endpoint.calls["job-take"] == []


def test_a_driver_that_hangs_ends_the_start_though_a_check_of_the_sdk_waits_for_it(
    tmp_path: Path,
) -> None:
    with checked(tmp_path, PATH=path_with(tmp_path, {"nvidia-smi": NVIDIA_SMI["silence"]})) as worked:
        assert worked.ends(40) == 1
        assert "nvidia-smi -L` hangs" in unhealthy(worked)["reason"]


# -- where the model lies -----------------------------------------------------------------------

NVIDIA_SMI = {
    "a GPU": "echo 'GPU 0: NVIDIA L4 (UUID: GPU-8d0b)'",
    "no GPU": "echo 'No devices were found'; exit 6",
    "no driver": "echo 'NVIDIA-SMI has failed: it cannot communicate with the NVIDIA driver.'; exit 9",
    "silence": "exec /bin/sleep 60",
}
IN_PART = "60 % of it in GPU memory; a smaller MAX_CONCURRENCY or OLLAMA_CONTEXT_LENGTH helps"
ON_CPU = "llama3:latest is computed on the CPU though there is a GPU: look at .* driver .* CUDA versions"


def machine(folder: Path, nvidia_smi: str) -> str:
    return path_with(folder, {"nvidia-smi": NVIDIA_SMI[nvidia_smi]} if nvidia_smi else {})


@pytest.mark.parametrize(
    ("nvidia_smi", "share", "warnings"),
    [
        ("a GPU", 1, []),
        ("a GPU", 0.6, [IN_PART]),
        *[("", share, []) for share in (0, 0.6, 1)],
        *[(fails, share, []) for fails in ("no GPU", "no driver") for share in (0, 0.6)],
    ],
)
def test_a_model_partly_on_the_cpu_is_a_warning_where_there_is_a_gpu(
    tmp_path: Path, nvidia_smi: str, share: float, warnings: list[str]
) -> None:
    with working({"gpu_share": share}, PATH=machine(tmp_path, nvidia_smi)) as worked:
        assert worked.endpoint.runsync({"message": "Hi"})["status"] == "COMPLETED"
        assert re.findall("^warning: (.*)", worked.worker.log, re.MULTILINE) == warnings


@pytest.mark.parametrize(
    ("nvidia_smi", "share", "words"),
    [("a GPU", 0, ON_CPU), ("silence", 1, "nvidia-smi -L` hangs: look at the machine's driver")],
)
def test_a_gpu_that_is_not_used_or_says_nothing_ends_the_start_and_is_reported(
    tmp_path: Path, nvidia_smi: str, share: float, words: str
) -> None:
    path = machine(tmp_path, nvidia_smi)
    with working({"gpu_share": share}, ready=False, PATH=path) as worked:
        assert worked.ends(40) == 1
        (reason,) = re.findall("^error: (.*)", worked.worker.log, re.MULTILINE)
        assert re.search(words, reason)
        assert unhealthy(worked)["reason"] == reason[:256]


@pytest.mark.parametrize("name", ["llama3:latest", "llama3"])
def test_one_line_says_that_the_model_is_ready_when_how_large_and_where(name: str) -> None:
    begun = time.monotonic()
    with working({"gpu_share": 0.25, "load_ms": 1500}, MODELS=name, PATH=BARE) as worked:
        took = time.monotonic() - begun
        (model,) = requests.get(f"http://{worked.host}/api/ps", timeout=5).json()["models"]
        line = r"^ready: (\S+) after ([\d.]+) s, ([\d.]+) GiB, (\d+) % of it in GPU memory$"
        ((told, seconds, size, share),) = re.findall(line, worked.worker.log, re.MULTILINE)
        assert (told, size, share) == (model["name"], f"{model['size'] / 2**30:.1f}", "25")
        assert 1.5 <= float(seconds) < took + 0.1


# -- the import of the SDK ----------------------------------------------------------------------

IMPORTER = """
import sys, cpuinfo, rp_handler
def get_cpu_info():
    print("the CPU's name was asked for")
    return {}
def handler(event):
    return {"imported": "runpod" in sys.modules, "real": cpuinfo.get_cpu_info is get_cpu_info}
cpuinfo.get_cpu_info, rp_handler.handler = get_cpu_info, handler
rp_handler.main()
"""


def test_the_sdks_import_asks_for_no_cpus_name_and_leaves_cpuinfo_as_it_was(ollama: Ollama) -> None:
    command = [sys.executable, "-c", IMPORTER, "--test_input", '{"input": {}}']
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=60)
    assert "{'imported': True, 'real': True}" in done.stdout
    assert "asked for" not in done.stdout
