"""The paper profile rehearsed: small local models under its names, through every stage up to a trained arm."""

from __future__ import annotations

import json
import os

import pytest
from asking import serving
from paper_swaps import swapped, write_focus
from scorer_models import counting_bert, counting_t5
from talker import CHATML, SETTINGS, in_chatml

from persodpo import dialogues, stages
from persodpo.config import load_profile
from persodpo.doctor import diagnose
from persodpo.files import read_json
from persodpo.prompts import load_template, render
from persodpo.runfolder import RunFolder
from persodpo.training.policy import load_policy, make_small_policy

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

LOCAL = ("Qwen2-7B-Instruct", "Qwen2-0.5B-Instruct", "Mistral-7B-Instruct", "Llama3-1-8B-Instruct")
WHOLE, BROKEN = '{"response": "I like place and word."}', '{"response": "I like'
SIZES = SETTINGS.model_copy(update={"max_length": 1024, "batch_tokens": 2048, "steps": 60})


@pytest.fixture(scope="module")
def talkers(tmp_path_factory):
    """Two models that answer in chats: one in JSON, one that never closes it."""
    folder = tmp_path_factory.mktemp("talkers")
    prompts = load_profile("paper").prompts
    rows = dialogues.focus_json(write_focus(folder)["train"], "train")
    texts = [
        in_chatml(render(load_template(prompts.template), personas, context, prompts))
        for personas, context in zip(rows["personas"], rows["context"], strict=True)
    ]
    made = {}
    for name, answer in (("whole", WHOLE), ("broken", BROKEN)):
        made[name] = make_small_policy([(text, answer) for text in texts], SIZES, folder / name)
        (made[name] / "chat_template.jinja").write_text(CHATML)
    return made


@pytest.fixture(scope="module")
def scorers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scorers")
    vectors = folder / "vectors.txt"
    vectors.write_text("like 1.0 0.0\nplace 0.5 0.5\nword 0.0 1.0\nsaid -1.0 0.5\n")
    return {
        "coherence": counting_t5(folder / "t5"), "c_score": counting_bert(folder / "c", max_length=512),
        "ue_score": counting_bert(folder / "ue", max_length=512), "persona_distance": vectors,
    }  # fmt: skip


def test_the_paper_profile_with_small_models_trains_an_arm(tmp_path, monkeypatch, talkers, scorers):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary/rehearsal")
    weights = {name: talkers["broken" if "7B" in name else "whole"] for name in LOCAL}
    with serving(tmp_path / "server.jsonl") as server:
        profile = swapped(
            tmp_path, weights, scorers, talkers["whole"], server.url, training__arms="[perso_weighted]",
            evaluation__seeds="[44]", evaluation__pairs="[[perso_weighted, base]]", evaluation__ablations="[]",
        )  # fmt: skip
        assert not [finding for finding in diagnose(profile) if finding.state == "missing"]
        reports = stages.make(profile, "train", arms=["perso_weighted"])
        asked = len(server.received())
        again = stages.make(profile, "train", arms=["perso_weighted"])
        assert len(server.received()) == asked
        evaluated = stages.make(profile, "evaluate")
        assert len(server.received()) == asked
    assert all(report.skipped for report in again), [str(report) for report in again]
    assert [report.stage for report in evaluated[-4:]] == [
        "evaluation/responses", "score evaluation/responses", "judge evaluation/responses", "evaluate",
    ]  # fmt: skip
    run = RunFolder(profile)
    assert [report.stage for report in reports] == [
        "dialogues", "answers", "responses", "extras", "score", "pairs", "train perso_weighted",
    ]  # fmt: skip
    responses = run.read("responses")
    assert responses.groupby("model").size().to_dict() == dict.fromkeys(profile.generation.models, 10)
    outcomes = responses.groupby("model")["outcome"].agg(set).to_dict()
    assert outcomes["Qwen2-0.5B-Instruct"] == outcomes["gpt-4o-mini"] == {"ok"}
    assert "ok" not in outcomes["Mistral-7B-Instruct"]
    assert responses[responses["model"].isin(LOCAL)]["batch_size"].eq(1).all()
    assert {one["key"] for one in server.received()} == {"Bearer sk-canary/rehearsal"}
    assert run.read("scores")["quality"].notna().all()
    assert all(len(run.read(f"pairs/{pairs}")) >= 20 for pairs in ("simple", "perso"))
    held_out = run.read("evaluation/responses")
    assert held_out.groupby("model").size().to_dict() == {"base": 4, "perso_weighted": 4}
    assert held_out[["batch_size", "response_time"]].notna().all(axis=None), "response times are a published metric"
    asking = [found.sentence for found in diagnose(profile) if found.sentence.startswith("Asking")]
    assert (
        sum("0 of 10 requests to ask" in sentence and "from 10 stored answers" in sentence for sentence in asking) == 7
    )
    arm = run.root / "training" / "perso_weighted"
    record = read_json(arm / "arm.json")
    assert record["steps"] == len(run.read("training/perso_weighted/log").query("kind == 'train'")) > 2
    assert load_policy(arm)[0].num_parameters() == record["parameters"]
    kept = b"".join(path.read_bytes() for path in run.root.rglob("*") if path.is_file())
    assert b"sk-canary" not in kept
    assert os.environ["OPENAI_API_KEY"] not in json.dumps([str(report) for report in reports])
