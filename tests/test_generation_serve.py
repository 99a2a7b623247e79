"""`transformers serve` as the endpoint: the client talks to a real server of a real, small model."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from asking import answers
from talker import CHATML, PLACES, in_chatml, make_talker, question, reply

from persodpo.config import TransformersModel
from persodpo.files import is_running
from persodpo.generation import serving
from persodpo.generation.ask import generate
from persodpo.generation.local import TransformersBackend
from persodpo.generation.requests import Request
from persodpo.generation.store import Store
from persodpo.training.policy import load_policy


def chat(text: str, tokens: int = 30) -> Request:
    return Request(text, ({"role": "user", "content": text},), tokens, 0.0, None, "t")


def served(model: Path) -> serving.ServedBackend:
    return serving.ServedBackend(TransformersModel(model="served", weights=str(model), served=True), model)


def servers_of(model: Path) -> list[int]:
    """Return the processes that serve a model."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            if f" serve {model} ".encode() in path.read_bytes().replace(b"\0", b" "):
                found.append(int(path.parent.name))
    return found


def wait_until(there: Callable[[], object]) -> None:
    for _ in range(600):
        if there():
            return
        time.sleep(0.05)
    pytest.fail("it did not happen within 30 s")


@pytest.mark.slow
def test_a_served_model_answers_raw_prompts_and_chats_and_its_server_ends(tmp_path: Path, store: Store) -> None:
    model = make_talker(tmp_path / "talker", in_chatml)
    (model / "chat_template.jinja").write_text(CHATML)
    raw = [Request(place, in_chatml(question(place)), 30, 0.0, None, "t") for place in PLACES]
    asked, via = [*raw, *(chat(question(place)) for place in PLACES), chat(question("Rome"), tokens=7)], served(model)
    summary = generate(asked, via, store)
    assert (summary.answered, summary.truncated) == (17, 1)
    assert servers_of(model) == []
    found = answers(store, asked, via)
    assert generate(asked, served(model.rename(tmp_path / "moved")), store).skipped == 17
    here = TransformersModel(model="here", weights=str(tmp_path / "moved"))
    local = TransformersBackend(here, tmp_path / "moved", load_policy)
    generate(raw, local, store)
    texts = [answer.completion for answer in answers(store, raw, local)]
    assert [answer.completion for answer in found[:16]] == texts * 2
    assert texts[0] == reply(PLACES[0])
    for answer in found[8:16]:
        assert (answer.finish_reason, answer.cost) == ("stop", 0.0)
        assert answer.prompt_tokens > 5
        assert answer.completion_tokens >= 5
        assert answer.latency > 0


def program(folder: Path, script: str) -> None:
    """Put a program in the place of transformers, beside a Python."""
    (folder / "python").symlink_to(sys.executable)
    (folder / "transformers").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "transformers").chmod(0o755)
    (folder / "model.safetensors").write_bytes(b"weights")


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("exit 3", r"ended with status 3 for model served"),
        ("sleep 60", r"did not answer within 0\.5 s for model served"),
        ("", r"install transformers\[serving\]"),
    ],
)
def test_a_server_that_does_not_come_up_is_one_sentence(
    script: str, says: str, tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path, script)
    if not script:
        (tmp_path / "transformers").unlink()
    monkeypatch.setattr(serving.sys, "executable", str(tmp_path / "python"))
    asked = served(tmp_path)
    asked.startup_seconds = 0.5 if "sleep" in script else 20
    summary = generate([chat("x")], asked, store)
    assert summary.answered == 0
    assert re.search(says, summary.stopped)


@pytest.mark.parametrize("name", ["pickled", "perso@45"])
def test_what_the_server_would_read_otherwise_is_not_served(tmp_path: Path, store: Store, name: str) -> None:
    """A pickle, and a path of which it takes a part for a revision."""
    folder = tmp_path / name
    folder.mkdir()
    (folder / ("pytorch_model.bin" if name == "pickled" else "model.safetensors")).write_bytes(b"weights")
    assert (
        "cannot be served: it must hold weights in safetensors" in generate([chat("x")], served(folder), store).stopped
    )


PARENT = """
import sys
from pathlib import Path
from persodpo.config import TransformersModel
from persodpo.generation import serving
from persodpo.generation.ask import generate
from persodpo.generation.requests import Request
from persodpo.generation.store import Store
folder = Path(sys.argv[1])
serving.sys.executable = str(folder / "python")
settings = TransformersModel(model="served", weights=str(folder), served=True)
with Store(folder / "answers.sqlite") as store:
    generate([Request("x", "x", 5, 0.0, None, "t")], serving.ServedBackend(settings, folder), store)
"""


def parent_of(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.parametrize(
    ("how", "of_leash"),
    [
        (signal.SIGKILL, False),
        (signal.SIGTERM, False),
        pytest.param(signal.SIGKILL, True, marks=pytest.mark.skipif(sys.platform != "linux", reason="no prctl")),
    ],
)
def test_a_server_does_not_outlive_its_parent(how: signal.Signals, of_leash: bool, tmp_path: Path) -> None:
    number = tmp_path / "number"
    program(tmp_path, f"echo $$ > {number}\nexec sleep 300")
    with subprocess.Popen([sys.executable, "-c", PARENT, tmp_path]) as parent:
        try:
            wait_until(lambda: number.is_file() and number.read_text().strip())
            os.kill(parent_of(int(number.read_text())) if of_leash else parent.pid, how)
            parent.wait(timeout=10)
        finally:
            parent.kill()
    wait_until(lambda: not is_running(int(number.read_text())))
    assert not is_running(int(number.read_text()))
