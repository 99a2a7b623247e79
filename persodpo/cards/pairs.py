"""Pair sets, their gate report and thresholds in, their dataset card out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
from huggingface_hub import DatasetCardData

from persodpo.cards.text import (
    CARD,
    PAPER,
    card,
    choices_table,
    code,
    command,
    defects,
    number,
    origin,
    pair_sets,
    table,
    write_card,
)
from persodpo.errors import PersodpoError
from persodpo.runfolder import RunFolder
from persodpo.tables import schema_of

#: What the two kinds of pairs are.
PAIR_SETS = {
    "simple": "parsed responses over failed ones, both as the models wrote them",
    "perso": "responses of high quality over responses of low quality to the same prompt",
}
#: What a column of a pair set holds.
COLUMNS = {
    "prompt": "persona, dialogue so far and instruction, as text",
    "chosen": "the completion to prefer",
    "rejected": "the completion to avoid",
    "score_chosen": "quality score of the chosen response, three decimals",
    "score_rejected": "quality score of the rejected response, three decimals",
    "dialogue_id": "the dialogue that the prompt was made from",
    "chosen_model": "the model that wrote the chosen response",
    "rejected_model": "the model that wrote the rejected response",
}
#: Checks of the gate that a card tells, and what it calls them.
COUNTS = {
    "pairs": "pairs", "prompts": "prompts", "responses": "responses", "fan_out_median": "pairs a prompt, median",
    "fan_out_max": "largest", "ties": "score ties", "duplicates": "repeated pairs",
    "leaked_pairs": "pairs of prompts in a held-out split",
}  # fmt: skip
SHORTCUTS = {
    "length_alone": "length",
    "format_alone": "whether it is one JSON object",
    "source_model_alone": "the model that wrote it",
}


def write_dataset_card(run: RunFolder) -> Path:
    """Write the card of a run's pair sets, if it is not there already as it should be.

    Args:
        run: A run folder with pairs.

    Returns:
        The card.

    Raises:
        PersodpoError: As `dataset_card`, or the disk fails.
    """
    return write_card(run.path("pairs/gate").parent / CARD, dataset_card(run))


def dataset_card(run: RunFolder) -> str:
    """Return the card of a run's pair sets.

    Args:
        run: A run folder with pairs, their gate report, scores, thresholds and responses.

    Returns:
        YAML front matter with a configuration for each pair set, then Markdown.

    Raises:
        PersodpoError: A table is missing or edited, pairs were made from other tables than lie in the folder, or the gate
            report does not cover them.
    """
    sets = pair_sets(run)
    gates = {pair_set: _gate(run, pair_set) for pair_set in sets}
    default = "perso" if "perso" in sets else sets[0]
    meanings = "\n".join(f"- `{name}`: {PAIR_SETS[name]}" for name in sets)
    return card(_data(run, gates, default), [
        f"# Preference pairs of the run `{run.profile.name}`",
        f"Pairs of a chosen and a rejected response to the same persona-grounded dialogue, made without annotation by "
        f"`persodpo`, a companion to {PAPER}. Models answered the same dialogues, automatic metrics scored the answers.",
        meanings,
        _counts(gates),
        _models(run, sets),
        _thresholds(run),
        "## What else tells chosen from rejected",
        _shortcuts(gates),
        "A policy trained on these pairs may learn this instead of what they are meant to teach. 50 % is chance.",
        "## Choices that shaped the pairs",
        choices_table(run),
        "## Known defects",
        defects(run),
        "## Columns",
        _columns(default),
        "## Loading",
        _loading(run, default),
        "## Training on them",
        _trl(run, default),
        "## Licence",
        "No licence is given here, for none is known that covers all texts. The responses are the models' and the prompts "
        "hold text of the dialogues: the licences and terms of those models and dialogues apply. Nobody "
        "has read all texts: they may be wrong, repetitive or unsuitable.",
        "## Origin",
        origin(run, [f"pairs/{name}" for name in sets]),
    ])  # fmt: skip


def _data(run: RunFolder, gates: Mapping[str, Mapping[str, float]], default: str) -> DatasetCardData:
    """Return what loaders read: a configuration for each pair set."""
    configs = [
        {"config_name": name, "data_files": [{"split": "train", "path": f"{name}.parquet"}]}
        | ({"default": True} if name == default else {})
        for name in gates
    ]
    return DatasetCardData(
        language=["en"],
        pretty_name=f"Preference pairs of the run {run.profile.name}",
        size_categories=[_size(sum(gate["pairs"] for gate in gates.values()))],
        task_categories=["text-generation"],
        tags=["dpo", "preference", "persona", "dialogue", "persodpo"],
        configs=configs,
    )


def _gate(run: RunFolder, pair_set: str) -> dict[str, float]:
    """Return the gate's checks of a pair set."""
    gate = run.read("pairs/gate").query("pair_set == @pair_set")
    checks: dict[str, float] = dict(zip(gate["check"], gate["value"], strict=True))
    missing = [check for check in (*COUNTS, *SHORTCUTS) if check not in checks]
    if missing or checks["pairs"] != run.provenance(f"pairs/{pair_set}").get("rows"):
        what = f"lacks {missing[0]} of" if missing else "is of other pairs than"
        raise PersodpoError(
            f"Table pairs/gate of run {run.profile.name} {what} pairs/{pair_set}; make both again with "
            f"{command(run, 'pairs')} --overwrite."
        )
    return checks


def _size(rows: float) -> str:
    """Return the Hub's name for a number of rows."""
    bounds = {1e3: "n<1K", 1e4: "1K<n<10K", 1e5: "10K<n<100K", 1e6: "100K<n<1M", 1e7: "1M<n<10M", 1e8: "10M<n<100M"}
    return next((name for bound, name in bounds.items() if rows < bound), "100M<n<1B")


def _counts(gates: Mapping[str, Mapping[str, float]]) -> str:
    rows = [(name, *(number(gate[check]) for check in COUNTS)) for name, gate in gates.items()]
    return table("How much there is:", ("pair set", *COUNTS.values()), rows)


def _models(run: RunFolder, sets: list[str]) -> str:
    columns: dict[str, pd.Series[int]] = {}
    for name in sets:
        sides = pq.read_table(run.checked_path(f"pairs/{name}"), columns=["chosen_model", "rejected_model"]).to_pandas()
        columns |= {f"{name}, {side}": sides[f"{side}_model"].value_counts() for side in ("chosen", "rejected")}
    counts = pd.DataFrame(columns).fillna(0).sort_index()
    rows = [(str(model), *map(number, row)) for model, row in zip(counts.index, counts.to_numpy(), strict=True)]
    return table("Whose responses, in pairs by side:", ("model", *columns), rows)


def _thresholds(run: RunFolder) -> str:
    value = run.read("thresholds").set_index("name")["value"]
    quantiles = run.provenance("pairs/gate")["settings"]["pairs"]
    return (
        f"For `perso` pairs a response may be chosen from a quality of {value['high']:.4f} on (quantile "
        f"{quantiles['high_quantile']:g}) and rejected up to {value['low']:.4f} (quantile {quantiles['low_quantile']:g}). "
        f"The score rewards a length of {value['target_words']:g} words."
    )


def _shortcuts(gates: Mapping[str, Mapping[str, float]]) -> str:
    rows = [
        (what, *("not known" if pd.isna(gate[check]) else f"{gate[check]:.1%}" for gate in gates.values()))
        for check, what in SHORTCUTS.items()
    ]
    return table("Share of pairs whose chosen side is told by one feature alone:", ("feature", *gates), rows)


def _columns(pair_set: str) -> str:
    rows = [(field.name, str(field.type), COLUMNS[field.name]) for field in schema_of(f"pairs/{pair_set}")]
    return table("The same for every pair set:", ("column", "type", "meaning"), rows)


def _loading(run: RunFolder, pair_set: str) -> str:
    folder = f"runs/{run.profile.name}/pairs"
    return code("python", f"""
from datasets import load_dataset

pairs = load_dataset("{folder}", "{pair_set}", split="train")
same = load_dataset("parquet", data_files="{folder}/{pair_set}.parquet", split="train")
""")  # fmt: skip


def _trl(run: RunFolder, pair_set: str) -> str:
    folder = f"runs/{run.profile.name}/pairs"
    plain = code("bash", f"""
trl dpo --dataset_name {folder} --dataset_config {pair_set} --model_name_or_path Qwen/Qwen2-0.5B-Instruct --output_dir dpo
""")  # fmt: skip
    weighted = code("python", f"""
from datasets import load_dataset
from persodpo.training.trainer import GroupedDPOConfig, GroupedDPOTrainer

pairs = load_dataset("{folder}", "{pair_set}", split="train")
args = GroupedDPOConfig("dpo", weighting="sigmoid", scale_weights=True)
GroupedDPOTrainer(model="Qwen/Qwen2-0.5B-Instruct", args=args, train_dataset=pairs).train()
""")  # fmt: skip
    return (
        f"{plain}\n\nTRL leaves the scores aside. With the trainer of `persodpo` they weight the pairs:\n\n{weighted}"
    )
