"""The published files in, tables with true model names out: only this module knows how the release is laid out.

Source: github.com/salehafzoon/PersoDPO at the commit in ``data/release_manifest.json``. The label "Qwen2-5B" of its
file names is Qwen2-0.5B; it is translated here and nowhere else. The released text carries no licence: it is fetched by
the user and never committed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from persodpo.completions import read_completions
from persodpo.errors import PersodpoError
from persodpo.files import DATA
from persodpo.tables import with_none

#: Column names of the metric files -> ours.
METRICS = {
    "Coh-UniEval": "coherence",
    "C Score": "c_score",
    "UE Score": "ue_score",
    "Persona Distance": "persona_distance",
}


@dataclass(frozen=True)
class PublishedSet:
    """One model's published responses to one split.

    Attributes:
        model: The model's name with its true size; a tuned policy carries its run after a slash.
        split: The split whose prompts it answered, in their order.
        label: The release's own name, as its results table writes it where it has a row.
        raw: File of completions as generated, None if none belongs to these responses.
        metrics: File of parsed responses with their scores, None if there is none.
    """

    model: str
    split: Literal["train", "valid"]
    label: str
    raw: str | None
    metrics: str | None


def _set(model: str, split: Literal["train", "valid"], label: str, *, raw: bool = True) -> PublishedSet:
    """Return a set whose files are called by its label."""
    completions = f"Raw Responses/FoCus/{label}.csv" if raw else None
    return PublishedSet(model, split, label, completions, f"Metrics Results/FoCus/{label}-results.xlsx")


#: The seven models whose responses are ranked.
TRAIN_SETS = tuple(
    _set(model, "train", f"{model.replace('Qwen2-0.5B', 'Qwen2-5B')}-train")
    for model in (
        "Qwen2-7B-Instruct", "Qwen2-0.5B-Instruct", "Mistral-7B-Instruct", "Llama3-1-8B-Instruct", "gpt-3.5-turbo",
        "gpt-4o-mini", "gpt-4-turbo",
    )
)  # fmt: skip
_BASE, _TUNED = "Qwen2-0.5B-Instruct", "Qwen2-5B-Instruct"
#: Responses to the valid prompts. The raw file of the untuned Qwen2-0.5B is a copy of its parsed one, and the raw file
#: of the ``perso`` run is of other generations than its parsed one, so that run counts as two (audit A7, A16, A17).
VALID_SETS = (
    _set("Qwen2-7B-Instruct", "valid", "Qwen2-7B-benchmark"),
    _set(_BASE, "valid", "Qwen2-5B-benchmark", raw=False),
    _set(f"{_BASE}/length_prior", "valid", f"{_TUNED}-length_prior"),
    _set(f"{_BASE}/simple", "valid", f"{_TUNED}-simple"),
    _set(f"{_BASE}/perso", "valid", f"{_TUNED}-perso", raw=False),
    PublishedSet(
        f"{_BASE}/perso-raw", "valid", f"{_TUNED}-perso (raw file)", f"Raw Responses/FoCus/{_TUNED}-perso.csv", None
    ),
)

#: Every published set, train first.
SETS = TRAIN_SETS + VALID_SETS


def ranked_sets(models: Sequence[str]) -> tuple[PublishedSet, ...]:
    """Return the published train sets of models; a model that has none is refused."""
    by_model = {which.model: which for which in TRAIN_SETS}
    unknown = [model for model in models if model not in by_model]
    if unknown:
        names = ", ".join(by_model)
        raise PersodpoError(f"generation.models: there are no published responses of '{unknown[0]}', only of {names}.")
    return tuple(by_model[model] for model in models)


def set_files(files: Mapping[str, Path], sets: Iterable[PublishedSet]) -> dict[str, Path]:
    """Return the files of published sets by manifest path."""
    return {name: files[name] for which in sets for name in (which.raw, which.metrics) if name}


def true_name(label: str) -> str:
    """Translate a published label to the model's true size ("Qwen2-5B" is Qwen2-0.5B)."""
    return label.replace("Qwen2-5B", "Qwen2-0.5B")


def prompts_file(split: Literal["train", "valid"]) -> str:
    """Return the manifest path of a split's prompts."""
    return f"Prompts/FoCus-{split}.csv"


def read_set(files: dict[str, Path], which: PublishedSet) -> pd.DataFrame:
    """Read one published set, row by row in the order of its prompts.

    Columns: completion (None if none was published), parsed (the published response, None for a failure), response_time
    (s), and the four metrics (NaN if none were published).
    """
    raw = pd.read_csv(files[which.raw]) if which.raw else None
    scored = _read_sheet(files[which.metrics], files[which.metrics].stat().st_mtime_ns) if which.metrics else None
    frame = next(table for table in (raw, scored) if table is not None)[["response_time"]].copy()
    frame["completion"] = raw["gen_response"] if raw is not None else None
    frame["parsed"] = scored["gen_response"] if scored is not None else None
    for published, ours in METRICS.items():
        frame[ours] = scored[published].astype(float) if scored is not None else float("nan")
    return with_none(frame)


@lru_cache(maxsize=len(SETS))
def _read_sheet(path: Path, _changed: int) -> pd.DataFrame:
    """Read a spreadsheet once a process and version; several stages look at the same ones, and parsing is slow."""
    return pd.read_excel(path)


def results_table() -> pd.DataFrame:
    """Return the published results table, nine rows, cells as printed (mean ± population standard deviation)."""
    return pd.read_csv(DATA / "published" / "published_results.csv", dtype=str)


def training_curves() -> pd.DataFrame:
    """Return loss, grad_norm, reward_margin and reward_accuracy by run and step, read from the published plots.

    Precision: loss within 2e-5, gradient norm 5e-3, margin 1e-4, accuracy 5e-5 of the plotted value.
    """
    return pd.read_csv(DATA / "published" / "training_curves.csv")


def training_losses() -> pd.DataFrame:
    """Return the losses logged by the two saved training runs (run, step, loss)."""
    return pd.read_csv(DATA / "published" / "published_losses.csv")


def fact_files() -> dict[str, Path]:
    """Return the files of published numbers that the project carries, by name."""
    return {f"published/{path.name}": path for path in sorted((DATA / "published").glob("*.*"))}


def counts() -> dict[str, Any]:
    """Return the published counts, thresholds, weights and run times as one nested object."""
    content: dict[str, Any] = json.loads((DATA / "published" / "published_counts.json").read_text(encoding="utf-8"))
    return content


def published_responses(
    files: dict[str, Path],
    sets: Iterable[PublishedSet],
    dialogues: pd.DataFrame,
    reading: Literal["as_released", "strict"],
) -> pd.DataFrame:
    """Read published completions; a set answers its split's dialogues in their order.

    Returns:
        A responses table, a dialogue's answers side by side. Where no completion was published, the published response
        stands alone and a failure's outcome is ``unknown``.

    Raises:
        PersodpoError: A set has another number of rows than its split.
    """
    frames = []
    for which in sets:
        frame = read_set(files, which)
        ids = dialogues.loc[dialogues["split"] == which.split, "dialogue_id"].to_numpy()
        if len(ids) != len(frame):
            raise PersodpoError(
                f"{which.label} has {len(frame)} responses for {len(ids)} {which.split} dialogues; fetch both again."
            )
        if which.raw:
            frame = read_completions(frame, reading)
        else:
            outcome = frame["parsed"].map(lambda text: "ok" if text else "unknown")
            frame = frame.assign(response=frame["parsed"], outcome=outcome)
        # The authors asked one prompt at a time; on what machine is not published.
        constants = {
            "split": which.split,
            "model": which.model,
            "finish_reason": None,
            "batch_size": 1,
            "hardware": None,
        }
        frames.append(frame.assign(dialogue_id=ids, **constants))
    table = pd.concat(frames, ignore_index=True)
    return table.sort_values("dialogue_id", kind="stable", ignore_index=True)


def published_metrics(files: dict[str, Path], sets: Iterable[PublishedSet], responses: pd.DataFrame) -> pd.DataFrame:
    """Read the published scores of parsed responses: dialogue_id, model, the four metrics and parsed, what was scored.

    Where the published parse failed, parsed is None, and the metrics are the release's own worst-case values.
    """
    frames = []
    for which in sets:
        frame = read_set(files, which)
        ids = responses.loc[responses["model"] == which.model, "dialogue_id"].to_numpy()
        frames.append(frame.assign(dialogue_id=ids, model=which.model))
    return pd.concat(frames, ignore_index=True)[["dialogue_id", "model", "parsed", *METRICS.values()]]
