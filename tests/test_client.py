"""The Ollama client against servers that trickle, hang, break and garble: a raw socket plays each."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import eventually, free_port

import rp_handler
from rp_handler import Job, answer

OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


class Player:
    """Answers /api/version as Ollama does, and plays `part` on every other request."""

    def __init__(self, part: Callable[[socket.socket], None]):
        self.part, self.played, self.hung_up = part, 0, threading.Event()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self.listener.getsockname()
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                threading.Thread(target=self.serve, args=(connection,), daemon=True).start()

    def serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            asked = connection.recv(65536)
            if asked.startswith(b"GET /api/version"):
                connection.sendall(OK + b'Content-Length: 15\r\n\r\n{"version":"0"}')
            elif asked:
                while not asked.endswith(b"}"):  # its body; to close before it is read would reset
                    asked += connection.recv(65536)
                self.played += 1
                try:
                    self.part(connection)
                finally:
                    self.hung_up.set()


def trickle(start: bytes, more: bytes) -> Callable[[socket.socket], None]:
    def part(connection: socket.socket) -> None:
        connection.sendall(start)
        while True:  # until the worker hangs up, which raises
            connection.sendall(more)
            time.sleep(0.02)

    return part


def say(*parts: bytes) -> Callable[[socket.socket], None]:
    def part(connection: socket.socket) -> None:
        for each in parts:
            connection.sendall(each)

    return part


def hang(connection: socket.socket) -> None:
    connection.recv(1)


@contextlib.contextmanager
def playing(part: Callable[[socket.socket], None]) -> Iterator[Player]:
    player = Player(part)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rp_handler, "OLLAMA", player.address)
        patch.setattr(rp_handler, "ADDRESS", f"127.0.0.1:{player.address[1]}")
        patch.setattr(rp_handler, "server", rp_handler.Server())
        try:
            yield player
        finally:
            player.listener.close()


def last_of(stream: bool, job: Job | None = None, seconds: float = 5) -> dict[str, Any]:
    event = {"id": "job-1", "input": {"message": "Hi", "stream": stream}}
    *_, last = answer(job or Job(event, streams=True, seconds=seconds))
    assert isinstance(last, dict)
    return last


TRICKLES = {
    "in the headers": trickle(OK + b"X-", b"x"),
    "in more and more headers": trickle(OK, b"X-A: b\r\n"),
    "in a chunk's size": trickle(CHUNKED, b"0"),
    "in a chunk": trickle(CHUNKED + b"ffff\r\n", b" "),
    "in a body": trickle(OK + b"Content-Length: 99999\r\n\r\n", b" "),
    "in a refusal": trickle(b"HTTP/1.1 500 No\r\nContent-Length: 99999\r\n\r\n", b"x"),
    "nothing": hang,
}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("part", TRICKLES.values(), ids=TRICKLES)
def test_the_limit_holds_whatever_trickles(
    part: Callable[[socket.socket], None], stream: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    with playing(part):
        started = time.monotonic()
        error = last_of(stream, seconds=0.6)["error"]
        assert "REQUEST_TIMEOUT=0.6 s" in error or "broke" in error  # http.client takes 100 headers
        assert time.monotonic() - started < 5
    assert "status=error" in capfd.readouterr().err


def body(content: bytes, length: int) -> bytes:
    return OK + b"Content-Length: %d\r\n\r\n" % length + content


GARBLED = {
    "a body cut short": (body(b'{"done": ', 500), "broke"),
    "no JSON": (body(b"<html>", 6), "garbled"),
    "no JSON object": (body(b"[1]", 3), "garbled"),
    "bytes that are no text": (body(b'{"\xff": 1}', 8), "garbled"),
    "a length that is none": (OK + b"Content-Length: x\r\n\r\n{}", "broke|broke off|garbled"),
    "a chunk's size that is none": (CHUNKED + b"zz\r\n{}\r\n", "broke"),
    "a chunk cut short": (CHUNKED + b"ff\r\n{", "broke"),
    "no HTTP": (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "broke"),
    "nothing": (b"", "broke"),
    "a runner that died": (
        b"HTTP/1.1 500 No\r\nContent-Length: 35\r\n\r\n" + b'{"error": "model runner has stopped"}'[:35],
        "runner has",
    ),
    "an object of another kind": (body(b'{"hello": 1}', 12), "broke off"),
}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(("said", "words"), GARBLED.values(), ids=GARBLED)
def test_what_is_garbled_is_the_servers_failure_and_tried_again(
    said: bytes, words: str, stream: bool
) -> None:
    with playing(say(said)) as player:
        error = last_of(stream)["error"]
        assert re.search(words, error) and "please report" not in error
        assert player.played == 2


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("part", [hang, trickle(OK + b"X-", b"x")], ids=["no byte", "half a header"])
def test_a_stop_reaches_a_request_before_its_first_byte(
    part: Callable[[socket.socket], None], stream: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    with playing(part) as player:
        job = Job(
            {"id": "job-1", "input": {"message": "Hi", "stream": stream}}, streams=True, seconds=60
        )
        answers: list[Any] = []
        thread = threading.Thread(target=lambda: answers.append(last_of(stream, job)))
        thread.start()
        eventually(lambda: player.played)
        job.stop()
        thread.join(5)
        assert answers[0]["error"] == "The job was cancelled."
        assert player.hung_up.wait(5) and player.played == 1
    assert "status=stopped" in capfd.readouterr().err


def test_a_stop_before_the_connection_leaves_none_open() -> None:
    with playing(hang) as player:
        job = Job({"id": "job-1", "input": {"message": "Hi"}}, seconds=60)
        job.stop()
        assert last_of(False, job)["error"] == "The job was cancelled."
        assert player.played == 0


def test_the_words_of_a_streams_last_line_reach_the_caller() -> None:
    # Ollama holds back what may become a tool call, and says in the last line what became none.
    done = b'{"model": "m", "message": {"content": "{}"}, "done": true}\n'
    event = {"id": "job-1", "input": {"message": "Hi", "stream": True}}
    with playing(say(body(done, len(done)))):
        first, last = answer(Job(event, streams=True, seconds=5))
    assert first == "{}"
    assert isinstance(last, dict) and last["status"] == "success" and "response" not in last


@pytest.mark.parametrize("name", ["http_proxy", "ALL_PROXY"])
def test_no_proxy_stands_before_loopback(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    done = b'{"model": "m", "message": {"content": "Hi"}, "done": true}'
    with playing(say(body(done, len(done)))):
        assert last_of(False)["response"] == "Hi"


def test_an_answer_of_many_megabytes_is_read_in_linear_time() -> None:
    def seconds(count: int) -> float:
        line = json.dumps({"model": "m", "message": {"content": "x" * count}, "done": True}).encode()
        pieces = [line[at : at + 4096] for at in range(0, len(line), 4096)]
        chunks = [b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces]
        with playing(say(CHUNKED, *chunks, b"0\r\n\r\n")):
            started = time.monotonic()
            assert len(last_of(False, seconds=60)["response"]) == count
            return time.monotonic() - started

    small = seconds(4_000_000)
    assert seconds(32_000_000) < 24 * small, "8 times the bytes; quadratic would be 64 times"
