"""A run's tables and records in, the cards of its pair sets and of its trained arms out: two templates, filled.

A card is the ``README.md`` of a folder in the form of the Hugging Face Hub. All that it says comes from the run folder, so
that the same tables give the same card.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pandas as pd
from huggingface_hub import DatasetCard, DatasetCardData, ModelCard, ModelCardData

from persodpo.corrections import CORRECTIONS
from persodpo.files import name_and_revision, read_json, read_text, write_text
from persodpo.runfolder import RunFolder

TEMPLATES = Path(__file__).parent / "templates"
_LOGGED = ("step", "loss", "reward_margin", "reward_accuracy", "parse_rate", "words", "loops")


def write_dataset_card(run: RunFolder) -> Path:
    """Write ``pairs/README.md``, the card of a run's pair sets, unless it is there as it should be."""
    gate = run.read("pairs/gate")
    sets = {name: run.provenance(f"pairs/{name}") for name in gate["pair_set"].unique()}
    default = "perso" if "perso" in sets else next(iter(sets))
    configs = [
        {"config_name": name, "data_files": [{"split": "train", "path": f"{name}.parquet"}], "default": name == default}
        for name in sets
    ]
    data = DatasetCardData(
        language=["en"], pretty_name=f"Preference pairs of the run {run.profile.name}", configs=configs,
        task_categories=["text-generation"], tags=["dpo", "preference", "persona", "dialogue", "persodpo"],
    )  # fmt: skip
    made_with = [run.provenance(name)["settings"]["corrections"] for name in ("responses", "scores", "pairs/gate")]
    switches = {name: on for table in made_with for name, on in table.items()}
    text = DatasetCard.from_template(
        data, str(TEMPLATES / "dataset_card.md"), plain=plain, number=number, run=run.profile.name, sets=sets,
        default=default, checks=gate.pivot_table(index=["check", "meaning"], columns="pair_set", values="value", sort=False),
        thresholds=run.read("thresholds").set_index("name")["value"], settings=run.provenance("pairs/gate")["settings"],
        corrections=[(name, meaning, switches[name]) for name, meaning in CORRECTIONS.items() if name in switches],
    ).content  # fmt: skip
    return _write(run.path("pairs/gate").parent, text)


def write_model_card(run: RunFolder, label: str, source: RunFolder, estimates: pd.DataFrame | None = None) -> Path:
    """Write ``training/<label>/README.md``, the card of a trained arm, unless it is there as it should be.

    Args:
        run: The run folder with the arm's record, log and health verdicts.
        label: Its folder in ``training/``.
        source: The run folder whose pairs it was trained on; another one for arm ``corrected``.
        estimates: Estimates table of an evaluation of this very arm; None before it is evaluated.
    """
    folder, arm = f"training/{label}", label.partition("@")[0]
    log, provenance = run.read(f"{folder}/log"), run.provenance(f"{folder}/log")
    record, settings = read_json(run.path(f"{folder}/log").with_name("arm.json")), provenance["settings"]
    adapter, policy = settings["training"]["lora_rank"], settings["policy"]
    on_hub = "/" in policy and not policy.startswith("miniature/") and not Path(policy).exists()
    data = ModelCardData(
        language=["en"], library_name="peft" if adapter else "transformers", pipeline_tag="text-generation",
        base_model=name_and_revision(policy)[0] if on_hub else None,
        model_name=f"persodpo {arm}", tags=["dpo", "trl", "persona", "persodpo"],
    )  # fmt: skip
    last = log.groupby("kind", sort=False).tail(1).set_index("kind")[list(_LOGGED)].dropna(axis="columns", how="all")
    scored = {} if estimates is None else run.provenance("evaluation/scores")["settings"]
    text = ModelCard.from_template(
        data, str(TEMPLATES / "model_card.md"), plain=plain, number=number, run=run.profile.name, label=label,
        source=source.profile.name, record=record, settings=settings, pairs=settings["arm"]["pairs"],
        pairs_sha256=source.provenance(f"pairs/{settings['arm']['pairs']}")["sha256"], made=provenance, last=last,
        health=run.read(f"{folder}/health").to_dict("records"), judges=scored.get("scorers", {}),
        models=run.profile.scoring.models.model_dump(),
        results=[] if estimates is None else estimates[estimates["arm"] == arm].to_dict("records"),
    ).content  # fmt: skip
    return _write(run.path(f"{folder}/log").parent, text)


def plain(value: Any) -> str:
    """Return a value as one line of Markdown in which no character is markup."""
    return re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", " ".join(str(value).split()))


def number(value: float, name: str = "") -> str:
    """Return a number with its thousands parted; a share, whose name ends in ``alone``, in percent."""
    if math.isnan(value):
        return "–"
    return f"{value:.1%}" if name.endswith("alone") else f"{value:,.4g}" if value % 1 else f"{value:,.0f}"


def _write(folder: Path, text: str) -> Path:
    path = folder / "README.md"
    if read_text(path) != text:
        write_text(path, text)
    return path
