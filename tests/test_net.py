"""What may not move while the code changes: published numbers, verdicts, pairs, losses, and the tables of a run."""

from __future__ import annotations

import hashlib

import pytest
import torch
from conftest import profile_in
from tiny import tiny_model, tiny_pairs, tiny_tokenizer
from torch.nn.functional import logsigmoid
from trl import DPOConfig, DPOTrainer

from persodpo.config import with_overrides
from persodpo.pairs import measured, rebuild
from persodpo.tables import SCHEMAS
from persodpo.training.arms import ARMS
from persodpo.training.run import arguments
from persodpo.training.trainer import GroupedDPOTrainer


def digest(rows) -> str:
    return hashlib.sha256("\n".join("|".join(map(str, row)) for row in rows).encode()).hexdigest()[:16]


def keys(pairs) -> list[tuple[str, str, str]]:
    return sorted(zip(pairs["dialogue_id"], pairs["chosen_model"], pairs["rejected_model"], strict=True))


def test_every_parity_row_keeps_its_number_and_verdict(release_run):
    parity = release_run.read("audit/parity")
    assert len(parity) == 92
    assert digest(parity[["group", "quantity", "ours", "verdict"]].itertuples(index=False)) == "595e5a346a485ae3"


def test_every_finding_keeps_its_verdict(release_run):
    findings = release_run.read("audit/findings")
    others = {"A2": "partly", "A10": "partly"}
    assert dict(zip(findings["id"], findings["verdict"], strict=True)) == {
        f"A{number}": others.get(f"A{number}", "confirmed") for number in range(1, 25)
    }


def test_released_pairs_keep_their_keys(release_run):
    found = {name: digest(keys(release_run.read(f"pairs/{name}"))) for name in ("simple", "perso")}
    assert found == {"simple": "206d72dce05a8236", "perso": "feb87343126d7694"}


@pytest.mark.parametrize(
    ("overrides", "pairs"),
    [
        (["pairs.low_quantile=0.2", "pairs.high_quantile=0.8"], 2387),
        (
            [
                "scoring.weights={coherence: 0.0, c_score: 0.25, ue_score: 0.25, persona_distance: 0.25, compliance: 0.25}"
            ],
            9050,
        ),
        (["scoring.normalisation=declared", "pairs.low_quantile=0.5", "pairs.high_quantile=0.5"], 14_435),
    ],
)
def test_pairs_at_other_weights_and_thresholds(release_run, overrides, pairs):
    responses, scores, dialogues = (release_run.read(name) for name in ("responses", "scores", "dialogues"))
    changed = with_overrides(release_run.profile, overrides)
    assert len(rebuild(responses, measured(responses, scores), dialogues, changed).pairs) == pairs


#: Optimiser steps that are compared, and prompts and pairs of each.
STEPS, PROMPTS, PAIRS = 20, 2, 6


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("arm", ARMS)
def test_the_first_losses_of_each_arm_are_stock_trls(arm, tmp_path):
    """Where pairs are weighed, which TRL cannot, plain passes and a plain loop stand in for it."""
    changes = [
        f"training.prompts_per_step={PROMPTS}", "training.epochs=2", "training.warmup_steps=0",
        "training.learning_rate=0.001", "training.scale_weights=false",
    ]  # fmt: skip
    args = arguments(arm, tmp_path / "ours", profile_in(tmp_path, *changes), 1)
    for name, value in {"eval_strategy": "no", "save_strategy": "no", "max_steps": STEPS, "disable_tqdm": True,
                        "train_sampling_strategy": "sequential", "lr_scheduler_type": "constant"}.items():  # fmt: skip
        setattr(args, name, value)
    dataset = tiny_pairs(STEPS * PROMPTS)
    ours = GroupedDPOTrainer(model=tiny_model(), args=args, train_dataset=dataset, processing_class=tiny_tokenizer())
    ours.train()
    stock_args = DPOConfig(
        str(tmp_path / "stock"), per_device_train_batch_size=PROMPTS * PAIRS, max_steps=STEPS, learning_rate=1e-3,
        lr_scheduler_type="constant", beta=args.beta, logging_steps=1, report_to=[], save_strategy="no", use_cpu=True,
        train_sampling_strategy="sequential", bf16=False, gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    stock = DPOTrainer(
        model=tiny_model(), ref_model=tiny_model(), args=stock_args, train_dataset=dataset,
        processing_class=tiny_tokenizer(),
    )  # fmt: skip
    if ARMS[arm].weighting == "none":
        stock.train()
        expected = [log["loss"] for log in stock.state.log_history if "loss" in log]
    else:
        expected = weighted_losses(stock.train_dataset, dataset, args)
    assert [log["loss"] for log in ours.state.log_history if "loss" in log] == pytest.approx(expected, abs=2e-5)


def weighted_losses(tokens, dataset, args) -> list[float]:
    """Train by hand: one plain pass a sequence, the sigmoid of the score margin times the loss, AdamW."""
    model, reference = tiny_model().train(), tiny_model().eval()
    optimiser = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay)
    losses = []
    for step in range(STEPS):
        rows = range(step * PROMPTS * PAIRS, (step + 1) * PROMPTS * PAIRS)
        margins = torch.stack([ratio(model, reference, tokens[row], "chosen_ids") for row in rows]) - torch.stack(
            [ratio(model, reference, tokens[row], "rejected_ids") for row in rows]
        )
        scores = torch.tensor([dataset[row]["score_chosen"] - dataset[row]["score_rejected"] for row in rows])
        loss = (torch.sigmoid(scores) * -logsigmoid(args.beta * margins)).mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimiser.step()
        losses.append(loss.item())
    return losses


def ratio(model, reference, row, side: str):
    ids = torch.tensor([row["prompt_ids"] + row[side]])
    first = len(row["prompt_ids"])
    with torch.no_grad():
        before = log_prob(reference, ids, first)
    return log_prob(model, ids, first) - before


def log_prob(model, ids, first: int):
    logits = model(input_ids=ids).logits[0, first - 1 : -1].log_softmax(-1)
    return logits.gather(-1, ids[0, first:, None]).sum()


def test_tables_keep_their_names_and_columns():
    assert digest((name, *map(str, schema)) for name, schema in sorted(SCHEMAS.items())) == "259cabdd259d1230"
