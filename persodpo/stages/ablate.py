"""Ablations: the same responses, policy and held-out prompts, with one thing done otherwise; and how much it changes.

Each starts from the arm that ``evaluation.ablated`` names, under the first seed, and is judged on the run's own quality
score whatever its pairs were ranked by.
"""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

from persodpo.config import Ablation, Profile, with_overrides
from persodpo.evaluation.bootstrap import Resampling
from persodpo.evaluation.observations import observe
from persodpo.evaluation.results import compare, estimates
from persodpo.pairs import Variant, measured, pair_keys, rebuild
from persodpo.runfolder import RunFolder, StageReport
from persodpo.stages.base import Need, Targets
from persodpo.stages.heldout import answer_held_out, judge_held_out, score_held_out
from persodpo.stages.train import arm_folder, train_on
from persodpo.tables import write_table
from persodpo.training.arms import ARMS

_TABLES = tuple(f"ablations/{kind}" for kind in ("pairs", "responses", "scores", "judged", "estimates", "comparisons"))


def needs(profile: Profile) -> list[Need]:
    """Return what ablations are set beside, if there are any."""
    return [Need("evaluate")] if profile.evaluation.ablations else []


def ablate(run: RunFolder, overwrite: bool = False) -> list[StageReport]:
    """Train, ask and score every ablation of the profile; without any, nothing is made."""
    chosen = run.profile.evaluation.ablations
    if not chosen:
        for table in _TABLES:
            run.forget(table)
        return []
    reports = [_train(run, ablation, overwrite) for ablation in chosen]
    folders = {ablation.name: arm_folder(run, label_of(ablation)) for ablation in chosen}
    reports.append(_pairs(run, overwrite))
    reports.append(answer_held_out(run, "ablations/responses", folders, 0, overwrite=overwrite))
    reports.append(score_held_out(run, "ablations/responses", "ablations/scores", overwrite=overwrite))
    reports.append(judge_held_out(run, "ablations/responses", "ablations/judged", overwrite=overwrite))
    return [*reports, _estimates(run, overwrite)]


def label_of(ablation: Ablation) -> str:
    """Return the name of an ablation's folder in ``training/``."""
    return "ablation-" + re.sub(r"[^a-z0-9]+", "-", ablation.name.lower()).strip("-")


def varied(profile: Profile, ablation: Ablation) -> Profile:
    """Return a profile with an ablation's settings; the weight of a signal that is left out is shared by the others."""
    found = list(ablation.changes)
    if ablation.without is not None:
        weights = profile.scoring.weights.model_dump() | {ablation.without: 0.0}
        total = sum(weights.values())
        found += [f"scoring.weights.{signal}={weight / total!r}" for signal, weight in weights.items()]
    return with_overrides(profile.with_corrections(*ablation.corrections), found)


def _variant(run: RunFolder, profile: Profile) -> Variant:
    responses, scores, dialogues = (run.read(name) for name in ("responses", "scores", "dialogues"))
    return rebuild(
        responses, measured(responses, scores), dialogues, profile, ARMS[run.profile.evaluation.ablated].pairs
    )


def _inputs(run: RunFolder) -> dict[str, Path]:
    return {name: run.path(name) for name in ("dialogues", "responses", "scores")}


def _train(run: RunFolder, ablation: Ablation, overwrite: bool) -> StageReport:
    """Train one ablation."""
    profile = run.profile
    variant = varied(profile, ablation)
    seeded = variant.model_copy(update={"seed": profile.evaluation.seeds[0]})
    basis = {
        "pairs": variant.pairs.model_dump(mode="json"),
        "scoring": variant.scoring.model_dump(mode="json"),
        "corrections": list(variant.corrections),
    }
    return train_on(
        run, profile.evaluation.ablated, label_of(ablation), lambda: _variant(run, variant).pairs, inputs=_inputs(run),
        profile=seeded, overwrite=overwrite, basis=basis | {"prompts": variant.prompts.model_dump(mode="json")},
    )  # fmt: skip


def _pairs(run: RunFolder, overwrite: bool) -> StageReport:
    """Count what became of the pairs."""
    profile, table = run.profile, "ablations/pairs"

    def build(targets: Targets) -> None:
        own = pair_keys(_variant(run, profile).pairs)
        rows = []
        for ablation in profile.evaluation.ablations:
            made = _variant(run, varied(profile, ablation))
            rows.append({
                "ablation": ablation.name, "pairs": len(made.pairs), "prompts": made.pairs["dialogue_id"].nunique(),
                "shared_pairs": len(own & pair_keys(made.pairs)), "low": made.ranking.low, "high": made.ranking.high,
            })  # fmt: skip
        write_table(targets[table], table, pd.DataFrame(rows))

    settings = profile.model_dump(mode="json", include={"corrections", "prompts", "scoring", "pairs", "evaluation"})
    return run.stage(
        "pairs of ablations", inputs=_inputs(run), settings=settings, outputs=[table], code=__name__,
        build=build, overwrite=overwrite,
    )  # fmt: skip


def _estimates(run: RunFolder, overwrite: bool) -> StageReport:
    """Estimate every ablation, and compare it with the arm that they start from on the same dialogues, one seed each."""
    settings, table = run.profile.evaluation, "ablations/estimates"
    compared = "ablations/comparisons"
    names = [f"{group}/{kind}" for group in ("evaluation", "ablations") for kind in ("responses", "scores", "judged")]

    def build(targets: Targets) -> None:
        own, other = (
            observe(run.read(f"{group}/responses"), run.read(f"{group}/scores"), judged=run.read(f"{group}/judged"))
            for group in ("evaluation", "ablations")
        )
        both = pd.concat([own[own["arm"] == settings.ablated], other], ignore_index=True)
        sampling = Resampling(settings.resamples, run.profile.seed)
        write_table(targets[table], table, estimates(both, sampling))
        pairs = [(ablation, settings.ablated) for ablation in other["arm"].unique()]
        write_table(targets[compared], compared, compare(both, pairs, sampling))

    return run.stage(
        "ablations",
        inputs={name: run.path(name) for name in names},
        settings={"ablated": settings.ablated, "resamples": settings.resamples, "seed": run.profile.seed},
        outputs=[table, compared],
        code=__name__,
        build=build,
        overwrite=overwrite,
    )
