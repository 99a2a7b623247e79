"""From dialogues to pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

import persodpo.completions
import persodpo.dialogues
import persodpo.gate
import persodpo.generation.run
import persodpo.pairs
import persodpo.prompts
import persodpo.scoring.compliance
import persodpo.scoring.run as scoring
from persodpo.artifacts import RunFolder
from persodpo.errors import PersodpoError
from persodpo.release import published
from persodpo.scoring import quality
from persodpo.settings import Profile
from persodpo.stages import score
from persodpo.stages.base import Reports, Targets, alone, published_files
from persodpo.tables import write_table

_DATASETS = {"blended_skill_talk": "Blended Skill Talk", "it_convai2": "IT-ConvAI2"}


@alone
def run_dialogues(profile: Profile, overwrite: bool = False) -> Reports:
    """Make the dialogues table."""
    run, settings = RunFolder(profile), profile.dialogues
    inputs = _dialogue_files(run)

    def build(targets: Targets) -> None:
        frames = []
        for key, path in inputs.items():
            split: persodpo.dialogues.Split = "train" if "train" in key else "valid"
            if settings.source == "published_focus":
                frames.append(persodpo.dialogues.published_focus(path, split))
            elif settings.source == "focus_json":
                drawn: dict[str, Any] = {
                    "size": settings.train_size,
                    "seed": settings.sample_seed,
                    "max_reference_words": settings.max_reference_words,
                }
                frames.append(persodpo.dialogues.focus_json(path, split, **(drawn if split == "train" else {})))
            else:
                frames.append(getattr(persodpo.dialogues, settings.source)(path))
        write_table(targets["dialogues"], "dialogues", pd.concat(frames, ignore_index=True))

    report = run.stage(
        "dialogues",
        inputs=inputs,
        settings=settings.model_dump(mode="json"),
        outputs=["dialogues"],
        code=[persodpo.dialogues],
        build=build,
        overwrite=overwrite,
    )
    return [report]


def _dialogue_files(run: RunFolder) -> dict[str, Path]:
    """Return the files that the dialogues are read from."""
    settings = run.profile.dialogues
    if settings.source == "focus_json":
        given = {"train": settings.train_file, "valid": settings.valid_file}
        return {split: path for split, path in given.items() if path}
    files = published_files(run)
    if settings.source == "published_focus":
        return {name: files[name] for name in (published.prompts_file("train"), published.prompts_file("valid"))}
    name = f"datasets/{_DATASETS[settings.source]}/ds_cleaned.csv"
    return {name: files[name]}


@alone
def run_generate(profile: Profile, overwrite: bool = False) -> Reports:
    """Make the responses tables: train responses to rank, and held-out ones."""
    chosen = _ranked_sets(profile)
    if profile.dialogues.source != "published_focus":
        raise PersodpoError(
            "generation.source published has responses to the published FoCus prompts only; "
            "set dialogues.source=published_focus."
        )
    reports = run_dialogues(profile)
    run = RunFolder(profile)
    files = published_files(run)

    def build(targets: Targets) -> None:
        dialogues = run.read("dialogues")
        for table, sets in (("responses", chosen), ("evaluation/responses", published.VALID_SETS)):
            frame = persodpo.generation.run.published_responses(files, sets, dialogues, profile.completions)
            write_table(targets[table], table, frame)

    report = run.stage(
        "generate",
        inputs={"dialogues": run.path("dialogues")} | _set_files(files, (*chosen, *published.VALID_SETS)),
        settings={"generation": profile.generation.model_dump(mode="json"), "reading": profile.completions.reading},
        outputs=["responses", "evaluation/responses"],
        code=[persodpo.generation.run, persodpo.completions, published],
        build=build,
        overwrite=overwrite,
    )
    return [*reports, report]


def _ranked_sets(profile: Profile) -> tuple[published.PublishedSet, ...]:
    """Return the published train sets of the profile's models."""
    known = {which.model: which for which in published.TRAIN_SETS}
    unknown = [model for model in profile.generation.models if model not in known]
    if unknown:
        names = ", ".join(known)
        raise PersodpoError(f"generation.models: there are no published responses of '{unknown[0]}', only of {names}.")
    return tuple(known[model] for model in profile.generation.models)


def _set_files(files: dict[str, Path], sets: tuple[published.PublishedSet, ...]) -> dict[str, Path]:
    return {name: files[name] for which in sets for name in (which.raw, which.metrics) if name}


@alone
def run_score(profile: Profile, overwrite: bool = False) -> Reports:
    """Make the scores tables and the thresholds."""
    reports = run_generate(profile)
    reports.append(score.run_extras(profile))
    if profile.scoring.source == "compute":
        return [*reports, score.run_computed(profile, overwrite)]
    run = RunFolder(profile)
    files = published_files(run)
    chosen = _ranked_sets(profile)

    def build(targets: Targets) -> None:
        tables = {table: run.read(table.replace("scores", "responses")) for table in score.TABLES}
        metrics = {
            table: scoring.published_metrics(files, sets, tables[table])
            for table, sets in zip(score.TABLES, (chosen, published.VALID_SETS), strict=True)
        }
        score.write_scores(profile, targets, tables, metrics)
        for left in ("probes", "scorers"):
            run.forget(left)

    report = run.stage(
        "score",
        inputs={name: run.path(name) for name in ("responses", "evaluation/responses")}
        | _set_files(files, (*chosen, *published.VALID_SETS)),
        settings=score.score_settings(profile),
        outputs=["scores", "thresholds", "evaluation/scores"],
        code=[scoring, quality, persodpo.scoring.compliance, persodpo.completions, published],
        build=build,
        overwrite=overwrite,
    )
    return [*reports, report]


@alone
def run_pairs(profile: Profile, overwrite: bool = False) -> Reports:
    """Make the pair sets and their gate report."""
    reports = run_score(profile)
    run = RunFolder(profile)
    names = [f"pairs/{pair_set}" for pair_set in profile.pairs.sets]

    def build(targets: Targets) -> None:
        connection = quality.connect(profile.engine, str(targets[names[0]].parent))
        responses, scores, dialogues = (run.read(name) for name in ("responses", "scores", "dialogues"))
        cuts = limits(run)
        gate = []
        for pair_set, name in zip(profile.pairs.sets, names, strict=True):
            pairs = persodpo.pairs.build_pairs(
                connection,
                pair_set,
                responses=responses,
                scores=scores,
                dialogues=dialogues,
                limits=cuts,
                profile=profile,
            )
            if pairs.empty:
                raise PersodpoError(
                    f"No {pair_set} pairs: no prompt has both a response to choose and one to reject; "
                    "move pairs.low_quantile and pairs.high_quantile together or add models."
                )
            write_table(targets[name], name, pairs)
            gate.append(persodpo.gate.inspect_pairs(pairs, dialogues, profile.seed).assign(pair_set=pair_set))
        write_table(targets["pairs/gate"], "pairs/gate", pd.concat(gate, ignore_index=True))
        for left in {"pairs/simple", "pairs/perso"} - set(names):
            run.forget(left)

    report = run.stage(
        "pairs",
        inputs={name: run.path(name) for name in ("dialogues", "responses", "scores", "thresholds")},
        settings={
            "pairs": profile.pairs.model_dump(mode="json"),
            "prompts": profile.prompts.model_dump(mode="json"),
            "template": persodpo.prompts.load_template(profile.prompts.template),
            "seed": profile.seed,
        },
        outputs=[*names, "pairs/gate"],
        code=[persodpo.pairs, persodpo.gate, persodpo.prompts, quality],
        build=build,
        overwrite=overwrite,
    )
    return [*reports, report]


def limits(run: RunFolder) -> tuple[float, float]:
    """Return the low and high threshold of quality."""
    value = run.read("thresholds").set_index("name")["value"]
    return float(value["low"]), float(value["high"])
