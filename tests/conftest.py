"""What the tests share: the tests' own Ollama as a process, and the worker beside it.

`rp_handler` reads its settings when it is imported, so the address of the scripted server that
`handler(event)` is tested with is chosen here, before any test file imports it.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

PROJECT = Path(__file__).parents[1]
TESTS = Path(__file__).parent
WORKER = [sys.executable, str(PROJECT / "rp_handler.py")]


# Below the ports that the kernel gives to outgoing connections; of pytest's two processes, one has
# the even and one the odd ones, and none is given twice: a port stays free until its server starts.
ODD = os.environ.get("PYTEST_XDIST_WORKER") == "gw1"
PORTS = iter(random.sample(range(20_000 + ODD, 32_000, 2), 6_000))


def free_port() -> int:
    while True:
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port := next(PORTS)))
            return port


for name in [
    name for name in os.environ if name.startswith(("OLLAMA_SCRIPT", "VAPI_", "RUNPOD_WEBHOOK"))
]:
    del os.environ[name]
os.environ["OLLAMA_HOST"] = f"127.0.0.1:{free_port()}"
os.environ["MODELS"] = "llama3:latest qwen2.5:7b"
os.environ["REQUEST_TIMEOUT"] = "5"
# Not the models in somebody's home, such as those that try.sh has pulled.
os.environ["OLLAMA_MODELS"] = tempfile.mkdtemp(prefix="no-models-")
atexit.register(shutil.rmtree, os.environ["OLLAMA_MODELS"], ignore_errors=True)
os.environ["PATH"] = os.pathsep.join([str(TESTS), str(Path(sys.executable).parent), os.environ["PATH"]])
sys.path.insert(0, str(PROJECT))


def eventually(check: Callable[[], Any], seconds: float = 10, worker: Any = None) -> Any:
    """The first true value of `check`; fails when there is none within `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := check():
            return value
        time.sleep(0.01)
    raise AssertionError(f"not within {seconds} s: {check} {worker.log if worker else ''}")


class Ollama:
    """The tests' own `ollama serve` as a process, and its control requests."""

    def __init__(self, host: str, **environment: str):
        self.host = host
        self.url = f"http://{host}"
        self.process = subprocess.Popen(
            ["ollama", "serve"],
            env={**os.environ, "OLLAMA_NO_CLOUD": "1", **environment, "OLLAMA_HOST": host},
            stderr=subprocess.DEVNULL,
        )

    def answers(self) -> bool:
        with contextlib.suppress(requests.ConnectionError):
            return requests.get(f"{self.url}/api/version", timeout=5).ok
        return False

    def script(self, **fields: Any) -> None:
        requests.post(f"{self.url}/test/script", json=fields, timeout=5).raise_for_status()

    def requests(self, *paths: str) -> list[dict[str, Any]]:
        seen = requests.get(f"{self.url}/test/requests", timeout=5).json()
        return [request for request in seen if not paths or request["path"] in paths]

    def last(self, path: str = "/api/chat") -> dict[str, Any]:
        return dict(self.requests(path)[-1])

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(10)


@contextlib.contextmanager
def serving(host: str | None = None, **environment: str) -> Iterator[Ollama]:
    ollama = Ollama(host or f"127.0.0.1:{free_port()}", **environment)
    try:
        eventually(ollama.answers)
        yield ollama
    finally:
        ollama.end()


SCRIPTED = {
    "OLLAMA_SCRIPT": json.dumps({"models": ["llama3:latest", "qwen2.5:7b"]}),
    "OLLAMA_NUM_PARALLEL": "8",
}


@pytest.fixture(scope="session")
def scripted_server() -> Iterator[Ollama]:
    with serving(os.environ["OLLAMA_HOST"], **SCRIPTED) as ollama:
        yield ollama


@pytest.fixture
def ollama(scripted_server: Ollama) -> Ollama:
    """The scripted server that `rp_handler` talks to, with its default script and no memory."""
    scripted_server.script()
    requests.post(f"{scripted_server.url}/test/clear", timeout=5)
    return scripted_server


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of models that holds the real small model under both default names."""
    folder = str(tmp_path_factory.mktemp("models"))
    with serving(OLLAMA_MODELS=folder) as ollama:
        for model in ("llama3:latest", "qwen2.5:7b"):
            subprocess.run(
                ["ollama", "pull", model], env={**os.environ, "OLLAMA_HOST": ollama.host}, check=True
            )
    return folder


def processes_at(host: str, name: str = "ollama") -> list[psutil.Process]:
    """What runs at `host`, as it knows from its environment: of Ollama, or with a `name` of "" all,
    the worker among it."""
    left = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("OLLAMA_HOST") == host and name in " ".join(process.cmdline()):
                left.append(process)
    return left


@contextlib.contextmanager
def own_host() -> Iterator[str]:
    """Where a worker starts a server of its own. When a test fails, the worker may have to be
    killed and leaves that server: nothing at this address outlives the block."""
    host = f"127.0.0.1:{free_port()}"
    try:
        yield host
    finally:
        for process in processes_at(host, name=""):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@pytest.fixture
def worker_environment(store: str) -> Iterator[dict[str, str]]:
    """The environment of a worker process that has to start a server of its own."""
    with own_host() as host:
        yield {**os.environ, "OLLAMA_HOST": host, "OLLAMA_MODELS": store, "REQUEST_TIMEOUT": "50"}
