"""A trained arm's record, log and health verdicts in, its model card out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from huggingface_hub import ModelCardData

from persodpo.cards.text import CARD, PAPER, card, code, command, defects, origin, pair_sets, table, write_card
from persodpo.config import ArmName
from persodpo.errors import PersodpoError
from persodpo.evaluation.exports import escape_markdown
from persodpo.runfolder import RunFolder, read_json
from persodpo.training.arms import ARMS, arm_of

ARM_RECORD = "arm.json"
#: What is told of a log, where it was logged.
_LAST = ("loss", "reward_margin", "reward_accuracy", "reward_chosen", "reward_rejected", "parse_rate", "words", "loops")


def write_model_card(run: RunFolder, label: str, source: RunFolder) -> Path:
    """Write the card of a trained arm, if it is not there already as it should be.

    Args:
        run: The run folder with the arm.
        label: Its name, as `persodpo.training.arms.label_of` gives it.
        source: The run folder whose pairs it was trained on; another one for arm ``corrected``.

    Returns:
        The card.

    Raises:
        PersodpoError: As `model_card`, or the disk fails.
    """
    return write_card(run.path(f"training/{label}/log").parent / CARD, model_card(run, label, source))


def model_card(run: RunFolder, label: str, source: RunFolder) -> str:
    """Return the card of a trained arm.

    Args:
        run: The run folder with the arm's record, log and health verdicts.
        label: Its name, as `persodpo.training.arms.label_of` gives it.
        source: The run folder whose pairs it was trained on.

    Returns:
        YAML front matter, then Markdown.

    Raises:
        PersodpoError: The arm is not trained to its end, a table is missing or edited, or the pairs in ``source`` are not
            those that it was trained on.
    """
    folder, arm = f"training/{label}", arm_of(label)
    log, health = run.read(f"{folder}/log"), run.read(f"{folder}/health")
    record = _record(run, label, source)
    settings = run.provenance(f"{folder}/log")["settings"]
    small, rank = _made_here(settings["policy"]), settings["training"]["lora_rank"]
    how = f"LoRA adapters of rank {rank}" if rank else "all weights"
    return card(_data(arm, settings), [
        f"# `{label}`, an arm of the run `{run.profile.name}`",
        f"**{escape_markdown(record['policy'])}**, trained with DPO on preference pairs ({how}) by `persodpo`, a companion "
        f"to {PAPER}. The arm `{arm}` stands for: {ARMS[arm].meaning}.",
        _small(record) if small else "",
        "## What it must not be used for",
        _limits(small=small),
        "## Pairs and settings",
        _training(record, arm, source, settings["training"]),
        _settings(settings),
        defects(source),
        "## Last values of the log",
        _last(log),
        "## Health",
        _health(health),
        "## Loading",
        _loading_model(run, folder, adapter=bool(rank)),
        "## Licence",
        "No licence is given here. That of the starting policy applies, and those of the models and dialogues whose texts "
        "it was trained on.",
        "## Origin",
        origin(run, [f"{folder}/log"]),
    ])  # fmt: skip


def _record(run: RunFolder, label: str, source: RunFolder) -> dict[str, Any]:
    """Return the record of an arm, after checking that it was trained to its end on the pairs in ``source``."""
    arm = arm_of(label)
    record = read_json(run.root / "training" / label / ARM_RECORD)
    again = f"{command(run, 'train')} --arm {arm}"
    if "steps" not in record:
        raise PersodpoError(f"{run.root / 'training' / label} holds no finished training; run {again}.")
    pair_sets(source)
    pairs = f"pairs/{ARMS[arm].pairs}"
    if run.provenance(f"training/{label}/log")["inputs"].get(pairs) != source.provenance(pairs).get("sha256"):
        raise PersodpoError(
            f"Arm {arm} of run {run.profile.name} was trained on other {ARMS[arm].pairs} pairs than lie in {source.root}; "
            f"train it again with {again}."
        )
    return record


def _made_here(policy: str) -> bool:
    """Tell whether a policy is made on the spot."""
    return policy == "small" or policy.startswith("miniature/")


def _data(arm: ArmName, settings: Mapping[str, Any]) -> ModelCardData:
    """Return what loaders read; a policy that lies on this machine only is not named."""
    policy = settings["policy"]
    return ModelCardData(
        language=["en"],
        library_name="peft" if settings["training"]["lora_rank"] else "transformers",
        pipeline_tag="text-generation",
        base_model=None if _made_here(policy) or Path(policy).is_dir() else policy,
        model_name=f"persodpo {arm}",
        tags=["dpo", "trl", "persona", "persodpo"],
    )


def _training(record: Mapping[str, Any], arm: ArmName, source: RunFolder, training: Mapping[str, Any]) -> str:
    """Say what the arm was trained on, how long, and what was left out."""
    spec = ARMS[arm]
    left_out = "; ".join(f"{name}: {text}" for name, text in record["left_out"].items())
    digest = source.provenance(f"pairs/{spec.pairs}")["sha256"]
    return (
        f"{record['train_pairs']:,} `{spec.pairs}` pairs to train on and {record['held_out_pairs']:,} of other prompts held "
        f"out; {_weighting(spec.weighting, training)}. {record['steps']:,} optimiser steps on {record['device']}, "
        f"{record['seconds']:,.0f} s. {left_out}.\n\n"
        f"The pairs are those of the run `{source.profile.name}` (sha256 {digest}); the card beside them says what else "
        "tells chosen from rejected."
    )


def _small(record: Mapping[str, Any]) -> str:
    return (
        f"This is a small model of {record['parameters']:,} parameters, made on the spot from texts of the run's "
        "own kind. It shows losses, weights and margins at work; it knows little of the language."
    )


def _limits(*, small: bool) -> str:
    first = "Not to talk with anybody, and not to judge the method by its answers: it is too small for either."
    return "\n".join([
        f"- {first if small else 'Not to talk with anybody before it was tested for that: nothing here was made safe.'}",
        "- Not to stand for a number of the paper, which trained other policies on other prompts.",
        "- Not as a judge of what people prefer: automatic metrics, not people, chose what it learned from.",
        "- Not with personal data of people who did not agree to it.",
    ])  # fmt: skip


def _weighting(weighting: str, training: Mapping[str, Any]) -> str:
    if weighting == "none":
        return "every pair counts the same"
    return f"pairs weigh by the {weighting} of their score margin" + (", mean 1" if training["scale_weights"] else "")


def _settings(settings: Mapping[str, Any]) -> str:
    shown = {**settings["training"], "reading": settings["reading"], "seed": settings["seed"]}
    return table("Every setting of the training:", ("setting", "value"), ((k, str(v)) for k, v in shown.items()))


def _last(log: pd.DataFrame) -> str:
    last = log.groupby("kind", sort=False).tail(1)
    known = [column for column in _LAST if last[column].notna().any()]
    rows = [
        (str(kind), str(step), *("" if pd.isna(value) else f"{value:.4g}" for value in values))
        for kind, step, *values in last[["kind", "step", *known]].itertuples(index=False)
    ]
    return table("The last row of each kind:", ("kind", "step", *known), rows)


def _health(health: pd.DataFrame) -> str:
    rows = health[["name", "level", "sentence"]].itertuples(index=False, name=None)
    return table("The last verdicts:", ("verdict", "level", "why"), rows)


def _loading_model(run: RunFolder, folder: str, *, adapter: bool) -> str:
    package, name = ("peft", "AutoPeftModelForCausalLM") if adapter else ("transformers", "AutoModelForCausalLM")
    imports = {package: [name]}
    imports.setdefault("transformers", []).append("AutoTokenizer")
    lines = [f"from {package} import {', '.join(names)}" for package, names in sorted(imports.items())]
    block = code("python", "\n".join([
        *lines, "",
        f'tokenizer = AutoTokenizer.from_pretrained("runs/{run.profile.name}/{folder}")',
        f'model = {name}.from_pretrained("runs/{run.profile.name}/{folder}")',
    ]))  # fmt: skip
    return f"{block}\n\nIt takes prompts like those of its pairs; `persodpo.completions.read_completion` reads its answers."
