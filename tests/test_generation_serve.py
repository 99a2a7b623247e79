"""`transformers serve` as the endpoint: the client talks to a real server of a real, small model."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from asking import backend
from talker import CHATML, PLACES, in_chatml, make_talker, question, reply

from persodpo.config import ServedModel, TransformersModel
from persodpo.generation import serving
from persodpo.generation.ask import generate
from persodpo.generation.local import TransformersBackend
from persodpo.generation.requests import Request, request_key
from persodpo.generation.store import Store
from persodpo.runfolder import is_running
from persodpo.training.policy import load_policy

TRANSFORMERS = str(Path(sys.executable).with_name("transformers"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_talker(tmp_path_factory.mktemp("served") / "talker", in_chatml)
    (folder / "chat_template.jinja").write_text(CHATML)
    return folder


@pytest.fixture(scope="module")
def url(model: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [TRANSFORMERS, "serve", str(model), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            wait_until_it_answers(f"http://127.0.0.1:{port}", process)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()


def wait_until_it_answers(address: str, process: subprocess.Popen) -> None:
    for _ in range(240):
        assert process.poll() is None, "transformers serve has ended"
        try:
            if httpx2.get(f"{address}/health", timeout=5).status_code == 200:
                return
        except httpx2.TransportError:
            pass
        time.sleep(0.25)
    pytest.fail("transformers serve did not answer within a minute")


def chat(text: str, tokens: int = 30) -> Request:
    return Request(text, ({"role": "user", "content": text},), tokens, 0.0, None, "t")


def raw(text: str) -> Request:
    return Request(text, in_chatml(text), 30, 0.0, None, "t")


@pytest.mark.slow
def test_a_served_model_answers_chats_and_raw_prompts(url: str, model: Path, tmp_path: Path) -> None:
    via = backend(url, served_as=str(model), timeout_seconds=60.0)
    asked = [*(chat(question(place)) for place in PLACES), *(raw(question(place)) for place in PLACES)]
    with Store(tmp_path / "answers.sqlite") as store:
        assert generate(asked, via, store).answered == 16
        found = [entry.answer for _, entry in store.entries([request_key(one, via) for one in asked])]
        assert generate(asked, via, store).skipped == 16
    here = TransformersBackend(
        TransformersModel(kind="transformers", model="here", weights=str(model)), model, load_policy
    )
    with Store(tmp_path / "here.sqlite") as store:
        generate(asked[8:], here, store)
        texts = [entry.answer.completion for _, entry in store.entries([request_key(one, here) for one in asked[8:]])]
    assert [answer.completion for answer in found] == texts * 2
    assert texts[0] == reply(PLACES[0])
    for answer in found[:8]:
        assert answer.finish_reason == "stop"
        assert answer.prompt_tokens > 5
        assert answer.completion_tokens >= 5
        assert answer.latency > 0


def test_an_answer_that_is_cut_off_says_so(url: str, model: Path, tmp_path: Path) -> None:
    via = backend(url, served_as=str(model), timeout_seconds=60.0)
    with Store(tmp_path / "answers.sqlite") as store:
        summary = generate([chat(question("Rome"), tokens=7)], via, store)
    assert summary.truncated == 1
    assert summary.outcomes == {"truncated": 1}


def test_a_model_that_is_not_served_is_named(url: str, tmp_path: Path) -> None:
    via = backend(url, served_as="no/such-model", attempts=1)
    with Store(tmp_path / "answers.sqlite") as store:
        summary = generate([chat("x")], via, store)
        ((_, entry),) = store.entries([request_key(chat("x"), via)])
    assert summary.answered == 0
    assert entry.answer.failure == "rejected"
    assert "no/such-model" in entry.answer.error


def served(model: Path, **changes: float) -> serving.ServedBackend:
    settings = ServedModel(kind="served", model="served", weights=str(model), **changes)
    return serving.ServedBackend(settings, model)


def servers_of(model: Path) -> list[str]:
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            lines.append(path.read_bytes().replace(b"\0", b" ").decode())
    return [line for line in lines if " serve " in line and str(model) in line]


@pytest.mark.slow
def test_a_served_backend_starts_its_server_and_ends_it(model: Path, tmp_path: Path) -> None:
    own = tmp_path / "model"
    shutil.copytree(model, own)
    asked, via = [raw(question(place)) for place in PLACES], served(own)
    with Store(tmp_path / "answers.sqlite") as store:
        assert generate(asked, via, store).answered == 8
        found = [entry.answer for _, entry in store.entries([request_key(one, via) for one in asked])]
        assert generate(asked, served(model), store).skipped == 8, "the same weights in another place"
        here = TransformersBackend(
            TransformersModel(kind="transformers", model="here", weights=str(own)), own, load_policy
        )
        generate(asked, here, store)
        by_itself = [entry.answer.completion for _, entry in store.entries([request_key(one, here) for one in asked])]
    assert [answer.completion for answer in found] == by_itself
    assert len(set(by_itself)) > 1
    assert {answer.cost for answer in found} == {0.0}
    assert servers_of(own) == []


@pytest.mark.parametrize(
    ("script", "says"),
    [("exit 3", r"ended by itself \(status 3\)"), ("sleep 60", r"did not answer for model served within 0\.5 s")],
)
def test_a_server_that_does_not_come_up_is_one_sentence(
    script: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "transformers"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    (tmp_path / "python").symlink_to(sys.executable)
    monkeypatch.setattr(serving.sys, "executable", str(tmp_path / "python"))
    with Store(tmp_path / "answers.sqlite") as store:
        summary = generate([chat("x")], served(tmp_path, startup_seconds=0.5 if "sleep" in script else 20), store)
    assert summary.answered == 0
    assert re.search(says, summary.stopped)


PARENT = """
import sys
from pathlib import Path
from persodpo.config import ServedModel
from persodpo.generation import serving
from persodpo.generation.ask import generate
from persodpo.generation.requests import Request
from persodpo.generation.store import Store
folder = Path(sys.argv[1])
serving.sys.executable = str(folder / "python")
settings = ServedModel(kind="served", model="served", weights=str(folder))
with Store(folder / "answers.sqlite") as store:
    generate([Request("x", "x", 5, 0.0, None, "t")], serving.ServedBackend(settings, folder), store)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_server_does_not_outlive_its_parent(how: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "python").symlink_to(sys.executable)
    program = tmp_path / "transformers"
    program.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/number\nexec sleep 300\n")
    program.chmod(0o755)
    number = tmp_path / "number"
    with subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)]) as parent:
        try:
            wait_until(lambda: number.is_file() and number.read_text().strip())
            parent.send_signal(how)
            parent.wait(timeout=10)
        finally:
            parent.kill()
    server = int(number.read_text())
    wait_until(lambda: not is_running(server))


def wait_until(there) -> None:
    for _ in range(600):
        if there():
            return
        time.sleep(0.05)
    pytest.fail("it did not happen within 30 s")


def test_a_missing_program_names_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving.sys, "executable", str(tmp_path / "python"))
    with Store(tmp_path / "answers.sqlite") as store:
        assert "install transformers[serving]" in generate([chat("x")], served(tmp_path), store).stopped
