"""The generate stage and command: from a profile to the tables, through real servers and models."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from asking import Server, serving
from conftest import QUICK_TRAINING
from faulty_server import completion
from talker import make_talker
from test_dialogues import focus_entry
from typer.testing import CliRunner

from persodpo import stages
from persodpo.cli import app
from persodpo.config import Profile, load_profile, with_overrides
from persodpo.errors import PersodpoError
from persodpo.files import PROJECT
from persodpo.generation.endpoint import OpenAIBackend
from persodpo.runfolder import RunFolder
from persodpo.stages.generate import Scope, forecasts

COMMAND = str(Path(sys.executable).with_name("persodpo"))
CANARY = "sk-canary/9d+1Z=="
PRICES = {"input_per_million": 1.0, "output_per_million": 2.0}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path / "server.jsonl") as started:
        yield started


def endpoint(server: Server, model: str = "api", **changes: Any) -> dict[str, Any]:
    return {"model": model, "base_url": server.url, "timeout_seconds": 5.0, "prices": PRICES, **changes}


def profile_of(
    folder: Path, *backends: dict[str, Any], faults: dict[int, str] | None = None, **settings: str
) -> Profile:
    """A profile of 12 train and 4 valid dialogues in FoCus's own JSON."""
    for split, count in (("train", 12), ("valid", 4)):
        entries = [focus_entry(number + (100 if split == "valid" else 0)) for number in range(count)]
        for number, mark in (faults or {}).items() if split == "train" else ():
            entries[number]["persona"][0] += mark
        (folder / f"{split}_focus.json").write_text(json.dumps({"data": entries}))
    plain = {
        "name": "asked", "dialogues.source": folder, "dialogues.train_size": "null", "home": folder,
        "generation.source": "models", "generation.models": json.dumps([entry["model"] for entry in backends]),
        "generation.backends": json.dumps(backends, default=str),
        **settings,
    }  # fmt: skip
    return load_profile("release", [f"{key}={value}" for key, value in plain.items()])


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def run(profile: Profile, folder: Path, *arguments: str) -> Done:
    """Run the command on a profile's file, in this process."""
    path = folder / "profile.yaml"
    path.write_text(profile.to_yaml())
    found = CliRunner().invoke(app, [*arguments, "--profile", str(path)])
    if found.exception and not isinstance(found.exception, SystemExit | PersodpoError):
        raise found.exception
    said = str(found.exception) if isinstance(found.exception, PersodpoError) else ""
    return Done(found.exit_code, found.stdout, found.stderr + said)


def prompts_at(server: Server) -> list[str]:
    return [event["prompt"] for event in server.received()]


def test_all_kinds_of_models_become_one_table(server: Server, tmp_path: Path, one_thread: None) -> None:
    talker = make_talker(tmp_path / "talker")
    local = {"model": "local", "weights": str(talker), "batch_size": 1}
    fast = {**local, "model": "fast", "batch_size": 32}
    faults = {3: "<<fault=status_400>>", 5: "<<fault=length>>"}
    profile = profile_of(tmp_path, endpoint(server), local, fast, faults=faults)
    reports = stages.make(profile, "generate")
    assert [report.stage for report in reports] == ["dialogues", "answers", "responses"]
    folder = RunFolder(profile)
    table = folder.read("responses").set_index(["model", "dialogue_id"])
    assert table.groupby("model").size().to_dict() == {"api": 12, "local": 12, "fast": 12}
    prompts = dict(zip(folder.read("dialogues")["dialogue_id"], prompts_at(server), strict=False))
    failed = table.loc[("api", "D3")]
    assert (failed["outcome"], failed["completion"], failed["response"]) == ("api_error", None, None)
    good = table.loc[("api", "D0")]
    assert (good["outcome"], good["finish_reason"]) == ("ok", "stop")
    assert good["completion"] in {completion(prompt) for prompt in prompts_at(server)}
    assert table.loc[("api", "D5"), "finish_reason"] == "length"
    assert table.loc["local", "batch_size"].eq(1).all()
    assert table.loc["fast", "batch_size"].eq(12).all()
    assert table.loc["api", "batch_size"].isna().all()
    assert table.loc["local", "hardware"].str.endswith("float32").all()
    answers = folder.read("answers").set_index(["model", "dialogue_id"])
    assert answers.loc[("api", "D3"), "failure"] == "rejected"
    assert answers.loc[("api", "D0"), "cost"] > 0
    assert len(prompts) == 12
    asked = len(prompts_at(server))
    again = stages.make(profile, "generate")
    assert all(report.skipped for report in again)
    assert len(prompts_at(server)) == asked


def test_what_is_missing_is_said_and_asked_by_the_next_run(server: Server, tmp_path: Path) -> None:
    profile = profile_of(tmp_path, endpoint(server), endpoint(server, "gone", base_url="http://127.0.0.1:9/v1"))
    with pytest.raises(PersodpoError, match=r"Not every prompt is answered yet \(gone: .*12 left.*cannot be reached"):
        stages.make(profile, "generate")
    assert len(prompts_at(server)) == 12
    mended = profile_of(tmp_path, endpoint(server), endpoint(server, "gone"))
    stages.make(mended, "generate")
    assert len(prompts_at(server)) == 24
    assert len(RunFolder(mended).read("responses")) == 24


def test_another_name_asks_nothing_that_a_run_beside_it_has(server: Server, tmp_path: Path) -> None:
    stages.make(profile_of(tmp_path, endpoint(server)), "generate")
    other = profile_of(tmp_path, endpoint(server), endpoint(server, "new"), name="other")
    run(other, tmp_path, "generate", "--models", "api", "--split", "train", "--limit", "1")
    files = {path: path.read_bytes() for path in RunFolder(other).root.glob("answers.sqlite*")}
    forecast = run(other, tmp_path, "generate", "--split", "train", "--dry-run").stdout
    assert files == {path: path.read_bytes() for path in RunFolder(other).root.glob("answers.sqlite*")}
    assert "api: 0 of 12 requests to ask" in forecast
    assert "new: 12 of 12 requests to ask" in forecast
    stages.make(other, "generate")
    assert len(prompts_at(server)) == 24
    table = RunFolder(other).read("answers").set_index("model")
    assert len(table.loc["api"]) == 12
    assert table.loc["api", "cost"].sum() == 0 < table.loc["new", "cost"].sum()


def test_a_run_beside_that_cannot_be_read_is_named_once_before_anything_is_asked(
    server: Server, tmp_path: Path
) -> None:
    stages.make(profile_of(tmp_path, endpoint(server)), "generate")
    store = RunFolder(profile_of(tmp_path, endpoint(server))).answers
    content = store.read_bytes()
    store.write_bytes(content[:4096] + b"\xff" * (len(content) - 4096))
    (store.parent.parent / "starting").mkdir()
    (store.parent.parent / "starting" / store.name).touch()
    other = profile_of(tmp_path, endpoint(server), name="other")
    with pytest.warns(UserWarning, match="not taken over") as told:
        run(other, tmp_path, "generate", "--dry-run")
    assert [str(store) in str(one.message) for one in told] == [True]
    assert len(prompts_at(server)) == 12
    with pytest.warns(UserWarning, match="not taken over") as told:
        stages.make(other, "generate")
    assert [str(store) in str(one.message) for one in told] == [True]
    assert len(prompts_at(server)) == 24


def test_models_splits_and_limits(server: Server, tmp_path: Path) -> None:
    profile = profile_of(tmp_path, endpoint(server, "one"), endpoint(server, "two"))
    done = run(profile, tmp_path, "generate", "--models", "two", "--split", "valid", "--limit", "3")
    assert done.returncode == 0, done.stderr
    assert "two: 3 answered, 0 failed" in done.stdout
    assert "answers (3 rows)" in done.stdout
    done = run(profile, tmp_path, "generate", "--models", "one", "--limit", "2")
    assert "one: 4 answered" in done.stdout
    table = RunFolder(profile).read("answers")
    assert table.groupby(["model", "split"]).size().to_dict() == {
        ("two", "valid"): 3, ("one", "train"): 2, ("one", "valid"): 2,
    }  # fmt: skip
    assert table.loc[table["split"] == "train", "dialogue_id"].tolist() == ["D0", "D1"]


def test_a_dry_run_sends_nothing_and_learns_from_what_is_stored(server: Server, tmp_path: Path) -> None:
    profile = profile_of(tmp_path, endpoint(server), **{"generation.budget_usd": "0.5"})
    before = run(profile, tmp_path, "generate", "--dry-run").stdout
    assert "api: 16 of 16 requests to ask" in before
    assert "from text lengths, nothing is stored yet" in before
    assert "$0.0000 are spent, the budget is $0.50" in before
    assert prompts_at(server) == []
    assert not RunFolder(profile).answers.exists()
    run(profile, tmp_path, "generate", "--models", "api", "--limit", "2")
    after = run(profile, tmp_path, "generate", "--dry-run").stdout
    assert "api: 12 of 16 requests to ask" in after
    assert "from 4 stored answers" in after
    stages.make(profile, "dialogues")
    (forecast,) = forecasts(RunFolder(profile), Scope(("api",)))
    stored = RunFolder(profile).read("answers")
    assert forecast.completion_tokens == round(12 * stored["completion_tokens"].mean())
    assert len(prompts_at(server)) == 4


def test_the_budget_stops_before_it_is_passed_and_says_what_is_left(server: Server, tmp_path: Path) -> None:
    profile = profile_of(tmp_path, endpoint(server, concurrency=2), **{"generation.budget_usd": "0.002"})
    done = run(profile, tmp_path, "generate", "--models", "api")
    assert done.returncode == 1
    spent = RunFolder(profile).read("answers")["cost"].sum()
    assert 0 < spent <= 0.002
    left = 16 - len(prompts_at(server))
    assert left > 0
    assert f"{left} left to do: The budget of $0.002 is used up" in done.stdout
    assert "raise generation.budget_usd" in done.stdout


def test_ctrl_c_stops_the_command_and_what_was_answered_is_kept(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # not ignored, as it is in the background
    with serving(tmp_path / "log.jsonl", "--latency", "0.4") as server:
        profile = profile_of(tmp_path, endpoint(server, concurrency=1))
        (tmp_path / "profile.yaml").write_text(profile.to_yaml())
        command = [COMMAND, "generate", "--models", "api", "--profile", str(tmp_path / "profile.yaml")]
        with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while len(server.events("delivered")) < 2:
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            assert process.wait(5) != 0
        assert len(prompts_at(server)) < 6
        assert re.search(r"1[1-4] of 16 requests", run(profile, tmp_path, "generate", "--dry-run").stdout)
    signal.signal(signal.SIGINT, before)


def test_failed_prompts_are_retried_on_request(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OpenAIBackend, "attempts", 1)
    profile = profile_of(tmp_path, endpoint(server), faults={1: "<<fault=status_500 times=1>>"})
    assert "1 failed (1 server_error)" in run(profile, tmp_path, "generate", "--models", "api").stdout
    assert "16 stored before" in run(profile, tmp_path, "generate", "--models", "api").stdout
    assert "1 answered, 0 failed, 15 stored before" in run(
        profile, tmp_path, "generate", "--models", "api", "--retry-failed"
    ).stdout  # fmt: skip
    assert RunFolder(profile).read("answers")["outcome"].eq("ok").all()


def test_templates_formats_and_budgets_reach_the_server(server: Server, tmp_path: Path) -> None:
    raw = endpoint(server, "raw", format="raw")
    chat = endpoint(server, "chat", format="chat_with_system", structured_output=True, served_as="chat-1")
    overrides = {"prompts.template": "chain_of_thought", "corrections": "[A5]"}
    profile = profile_of(tmp_path, raw, chat, **overrides)
    stages.make(profile, "ask", scope=Scope(("raw", "chat"), ("valid",), 1), progress=False)
    first, second = sorted(server.received(), key=lambda event: event["path"], reverse=True)
    assert (first["path"], second["path"]) == ("/v1/completions", "/v1/chat/completions")
    assert first["fields"] == {"model": "raw", "temperature": 0.0, "max_tokens": 2 * (220 + 16)}
    assert first["prompt"] == second["prompt"]
    assert '"reasoning"' in first["prompt"]
    schema = second["fields"]["response_format"]["json_schema"]["schema"]
    assert schema["required"] == ["reasoning", "response"]
    assert second["fields"]["model"] == "chat-1"
    stages.make(profile_of(tmp_path, raw, chat), "ask", scope=Scope(("raw",), ("valid",), 1), progress=False)
    assert server.received()[-1]["fields"]["max_tokens"] == 110
    assert len(server.received()) == 3  # another template and budget is another question
    drawn = profile_of(tmp_path, raw, chat, **{"generation.temperature": 0.7, "seed": 45})
    stages.make(drawn, "ask", scope=Scope(("raw",), ("valid",), 1), progress=False)
    assert [event["fields"].get("seed") for event in server.received()] == [None, None, None, 45]


@pytest.mark.slow
def test_the_key_is_in_no_file_and_no_output(server: Server, tmp_path: Path) -> None:
    faults = {0: "<<fault=echo>>", 1: "<<fault=status_400>>", 2: "<<fault=status_500>>"}
    profile = profile_of(tmp_path, endpoint(server, api_key_env="LAB_KEY"), faults=faults)
    (tmp_path / "profile.yaml").write_text(profile.to_yaml())
    command = [COMMAND, "generate", "--profile", str(tmp_path / "profile.yaml")]
    told = {"capture_output": True, "text": True, "cwd": PROJECT, "env": os.environ | {"LAB_KEY": CANARY}}
    outputs = [subprocess.run([*command, *more], check=True, **told) for more in ([], ["--dry-run"])]
    assert {event["key"] for event in server.received()} == {f"Bearer {CANARY}"}
    for done in outputs:
        assert CANARY not in done.stdout + done.stderr
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert any(path.name == "answers.sqlite" for path in files)
    for path in files:
        assert CANARY.encode() not in path.read_bytes(), path
    refused = run(profile, tmp_path, "generate", "--retry-failed")
    assert "API key in the environment variable LAB_KEY, which is not set" in refused.stdout
    assert refused.returncode == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--models", "nobody"], "Model 'nobody' has no entry in generation.backends; there are: api."),
        (["--split", "test"], "There is no split 'test'; name train or valid."),
        (
            ["--models", "api", "--set", "prompts.template=/nonexistent"],
            "neither a shipped one (brief, chain_of_thought,",
        ),
        (["--set", "generation.models=[nobody]"], "'nobody' has no entry in backends; there are api"),
        (
            ["--set", "generation.backends=[{model: x, base_url: y, concurency: 3}]"],
            "did you mean generation.backends.openai.concurrency?",
        ),
        (["--models", "api", "--limit", "0"], "greater than or equal to 1"),
    ],
)
def test_bad_input_is_one_sentence(server: Server, tmp_path: Path, arguments: list[str], words: str) -> None:
    done = run(profile_of(tmp_path, endpoint(server)), tmp_path, "generate", *arguments)
    assert done.returncode != 0
    assert words in " ".join(done.stderr.split()), done.stderr
    assert "Traceback" not in done.stderr
    assert server.received() == []


def test_a_dialogue_without_a_context_is_named(server: Server, tmp_path: Path) -> None:
    profile = profile_of(tmp_path, endpoint(server))
    table = yaml.safe_load((tmp_path / "train_focus.json").read_text())
    table["data"][4]["utterance"][-1]["dialogue2"] = ["", "an answer"]
    (tmp_path / "train_focus.json").write_text(json.dumps(table))
    done = run(profile, tmp_path, "generate")
    assert "Dialogue 'D4' has no context to answer (1 such dialogues)" in done.stderr, done.stderr
    assert server.received() == []


def test_the_small_policy_needs_responses_first(tmp_path: Path, server: Server) -> None:
    small = {"model": "small", "weights": "policy"}
    with pytest.raises(PersodpoError, match=r"is made from responses that are there already"):
        stages.make(profile_of(tmp_path, small), "generate")


@pytest.mark.slow
def test_the_small_model_answers_the_published_prompts(
    release_run: RunFolder, tmp_path: Path, one_thread: None
) -> None:
    """`persodpo generate` with a model that has learned next to nothing."""
    path = tmp_path / "profile.yaml"
    path.write_text(with_overrides(release_run.profile, [*QUICK_TRAINING, "training.max_length=2048"]).to_yaml())
    arguments = ["generate", "--profile", str(path), "--models", "small", "--split", "valid", "--limit", "50"]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert "small: 50 answered, 0 failed" in done.stdout
    answers = release_run.read("answers")
    assert len(answers) == 50
    assert set(answers["dialogue_id"]) <= set(release_run.read("dialogues").query("split == 'valid'")["dialogue_id"])
    assert answers["completion_tokens"].between(0, 110).all()
    again = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert "small: 0 answered, 0 failed, 50 stored before" in again.stdout
