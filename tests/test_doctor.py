"""What the doctor finds: each thing when it is there and when it is not; nothing is sent, and nothing stays written."""

from __future__ import annotations

import json
import os
import shutil
import socket

import pytest
from conftest import profile_in
from paper_swaps import swapped
from typer.testing import CliRunner

from persodpo import doctor
from persodpo.cli import app
from persodpo.config import load_profile, with_overrides
from persodpo.files import RELEASE_VARIABLE

RELEASE = os.environ.get(RELEASE_VARIABLE)
CANARY = "sk-canary/9d+1Z=="
LOCAL = ("Qwen2-7B-Instruct", "Qwen2-0.5B-Instruct", "Mistral-7B-Instruct", "Llama3-1-8B-Instruct")
SCORERS = ("coherence", "c_score", "ue_score", "persona_distance")


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """Away from the machine's own cache and GPU, with a key and no way out."""
    monkeypatch.setattr(doctor.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(doctor, "device_name", lambda: "cpu")
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    monkeypatch.delenv(RELEASE_VARIABLE, raising=False)
    monkeypatch.setattr(socket.socket, "connect", None)
    monkeypatch.setattr(socket, "getaddrinfo", None)


def equipped(folder, **changes):
    """The paper profile on a machine that has everything."""
    models = {name: folder / name for name in (*LOCAL, *SCORERS)}
    for path in models.values():
        path.mkdir()
        (path / "model.safetensors").write_bytes(b"no weights")
    scorers = {name: models[name] for name in SCORERS}
    return swapped(folder, models, scorers, models[LOCAL[1]], "http://127.0.0.1:9/v1", **changes)


def missing(profile):
    return [finding.sentence for finding in doctor.diagnose(profile) if finding.state == "missing"]


def command(profile, path):
    path.write_text(profile.to_yaml())
    return CliRunner().invoke(app, ["doctor", "--profile", str(path)], catch_exceptions=False)


def test_a_machine_that_has_nothing(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    places = [f"home={tmp_path}"]
    done = command(load_profile("paper", places), tmp_path / "profile.yaml")
    assert done.exit_code == 1
    for thing in ("train_focus.json", "OPENAI_API_KEY", "Qwen/Qwen2-7B-Instruct", "scorers/snli", "GoogleNews"):
        assert any(line.startswith("missing") and thing in line for line in done.stdout.splitlines()), thing
    assert missing(load_profile("mini", places)) == []
    assert list(tmp_path.iterdir()) == [tmp_path / "profile.yaml"]


def test_a_machine_that_has_everything(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "find_spec", lambda name: name)
    profile, before = equipped(tmp_path), sorted(tmp_path.rglob("*"))
    done = command(profile, tmp_path / "profile.yaml")
    assert done.exit_code == 0, done.stdout
    assert "sk-canary" not in done.output
    assert sum("10 of 10 requests to ask" in line for line in done.stdout.splitlines()) == len(LOCAL) + 3
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "profile.yaml"])


def test_a_price_that_a_budget_needs(tmp_path):
    profile = equipped(tmp_path)
    entries = [entry.model_dump(mode="json") for entry in profile.generation.backends]
    entries[-1]["prices"] = None
    found = missing(with_overrides(profile, [f"generation.backends={json.dumps(entries)}"]))
    assert any(entries[-1]["model"] in sentence for sentence in found)


def test_models_in_folders_and_in_the_cache_of_the_hub(tmp_path):
    profile = equipped(tmp_path, policy__model="someone/model", scoring__models__persona_distance="encoder")
    (tmp_path / "c_score" / "model.safetensors").rename(tmp_path / "c_score" / "pytorch_model.bin")
    shutil.rmtree(tmp_path / "ue_score")
    lost = missing(profile)
    assert all(name in sentence for name, sentence in zip(("someone/model", "c_score", "ue_score"), lost, strict=True))
    place = tmp_path / "hub" / "models--someone--model"
    for path, content in (("refs/main", "c0ffee"), ("snapshots/c0ffee/model.safetensors", "")):
        (place / path).parent.mkdir(parents=True)
        (place / path).write_text(content)
    assert missing(profile) == lost[1:]
    (tmp_path / "arm").mkdir()
    (found,) = missing(with_overrides(profile, [f"policy.model={tmp_path}/arm@45"]))[:1]
    assert found.startswith(f"Model of the policy: {tmp_path}/arm@45 is not here")


def test_packages_gpu_and_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "find_spec", lambda _: None)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 2**29))
    found = missing(equipped(tmp_path, scoring__ray_workers=2))
    wanted = ["Package ray", "Disk", "Disk"]
    assert [sentence.split(":")[0] for sentence in found] == wanted


@pytest.mark.skipif(not RELEASE, reason=f"{RELEASE_VARIABLE} is not set: the published files are not at hand")
def test_published_files_that_are_there_and_one_that_was_edited(tmp_path):
    assert "persodpo fetch release" in missing(profile_in(tmp_path))[0]
    shutil.copytree(RELEASE, tmp_path / "data" / "release")
    assert missing(profile_in(tmp_path)) == []
    edited = max((tmp_path / "data" / "release").rglob("*.csv"), key=lambda path: path.stat().st_size)
    edited.chmod(0o644)
    edited.write_bytes(edited.read_bytes()[:-1] + b"?")
    assert edited.name in missing(profile_in(tmp_path))[0]
