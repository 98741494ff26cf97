"""The turns of many calls: what the image lets llama-server keep of them, and that it keeps them apart.

The real small model computes here, started as in the image: by a script in llama-server's place.
"""

from __future__ import annotations

import os
import random
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import PROJECT, TESTS, Ollama, serving

SETTINGS = re.compile(r"(SLOT_PROMPT_SIMILARITY|LLAMA_ARG_CACHE_RAM)=(\S+)")
LLAMA_SERVER = f"""#!/bin/sh
exec '{sys.executable}' '{TESTS / "ollama"}' llama-server "$@" \\
    ${{SLOT_PROMPT_SIMILARITY:+--slot-prompt-similarity "$SLOT_PROMPT_SIMILARITY"}}
"""


def as_in_the_image(folder: Path) -> dict[str, str]:
    """What `ollama serve` needs to start its models as the image does; `folder` is empty."""
    (folder / "ollama").symlink_to(TESTS / "ollama")
    (folder / "llama-server").write_text(LLAMA_SERVER)
    (folder / "llama-server").chmod(0o755)
    settings = dict(SETTINGS.findall((PROJECT / "Dockerfile").read_text()))
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", **settings}


def say(ollama: Ollama, messages: list[dict[str, str]], text: str, tokens: int) -> dict[str, Any]:
    """A turn of the call that has these messages so far, and gets two more."""
    messages.append({"role": "user", "content": text})
    options = {"temperature": 0, "num_predict": tokens}
    body = {"model": "llama3:latest", "messages": messages, "stream": False, "options": options}
    answer = requests.post(f"{ollama.url}/api/chat", json=body, timeout=100).json()
    messages.append(answer["message"])
    return dict(answer)


def computed(ollama: Ollama) -> int:
    """Tokens of all prompts that were in no cache."""
    return sum(seen["computed"] for seen in ollama.requests("/api/chat"))


def system(text: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": text}]


def test_turns_of_different_calls_leave_each_other_s_history_alone(store: str, tmp_path: Path) -> None:
    rules = " ".join(f"Rule {number}: answer briefly, as on a phone call." for number in range(8))
    tokens = {}
    for start in ({}, as_in_the_image(tmp_path)):
        with serving(OLLAMA_MODELS=store, OLLAMA_NUM_PARALLEL="4", **start) as ollama:
            calls = [system(rules) for _ in range(3)]
            for turn in range(5):
                for number, call in enumerate(calls):
                    say(ollama, call, f"{number}{turn}: When will my order be here?", 1)
            tokens["the image" if start else "Ollama"] = computed(ollama)
    assert tokens["the image"] < 0.7 * tokens["Ollama"]


SECRETS = """
    zebra violin pepper harbor candle tunnel saddle magnet parrot ribbon copper lizard marble pillow
    rocket salmon timber velvet wizard
""".split()


@pytest.mark.timeout(300)  # 40 s on a machine that has nothing else to do
def test_nobody_hears_another_caller(store: str, tmp_path: Path) -> None:
    """Four slots, and more callers than slots: a history that comes back comes out of the cache."""
    dice, prompt_tokens = random.Random(1), 0
    answers: list[tuple[str, str]] = []
    calls = {secret: system("Answer with the secret word of the caller.") for secret in SECRETS}
    for secret, call in calls.items():
        call.append({"role": "user", "content": f"My secret word is {secret}."})
        call.append({"role": "assistant", "content": secret})
    with (
        serving(OLLAMA_MODELS=store, OLLAMA_NUM_PARALLEL="4", **as_in_the_image(tmp_path)) as ollama,
        ThreadPoolExecutor(4) as pool,
    ):
        while len(answers) < 200:
            at_once = dice.sample(SECRETS, dice.randint(1, 4))
            asked = [pool.submit(say, ollama, calls[secret], "My secret word?", 6) for secret in at_once]
            for secret, answer in zip(at_once, asked, strict=True):
                prompt_tokens += answer.result()["prompt_eval_count"]
                answers.append((secret, answer.result()["message"]["content"].lower()))
        assert computed(ollama) < 0.3 * prompt_tokens, "few histories came out of the cache"
    heard = [(secret, {word for word in SECRETS if word in said}) for secret, said in answers]
    assert [one for one in heard if one[1] - {one[0]}] == []
    assert sum(secret in words for secret, words in heard) > 0.9 * len(answers)
