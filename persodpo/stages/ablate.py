"""Ablations: the same responses, policy and held-out prompts, with one thing done otherwise; and how much it changes.

Each starts from the arm that ``evaluation.ablated`` names, under the first seed, and is judged on the run's own quality
score whatever its pairs were ranked by.
"""

from __future__ import annotations

import re

import pandas as pd

from persodpo.config import Ablation, Profile, with_overrides
from persodpo.pairs import Variant, measured, pair_keys, rebuild
from persodpo.runfolder import RunFolder, StageReport, Tables
from persodpo.stages.base import Need
from persodpo.stages.heldout import held_out
from persodpo.stages.train import arm_folder, train_on
from persodpo.training.arms import ARMS

_READS = ("responses", "scores", "dialogues")
_TABLES = tuple(f"ablations/{kind}" for kind in ("pairs", "responses", "scores", "judged", "estimates", "comparisons"))


def needs(profile: Profile) -> list[Need]:
    """Return what ablations are set beside, if there are any."""
    return [Need("evaluate")] if profile.evaluation.ablations else []


def ablate(run: RunFolder, overwrite: bool = False) -> list[StageReport]:
    """Train, ask and score every ablation of the profile; without any, nothing is made."""
    ablations = run.profile.evaluation.ablations
    if not ablations:
        for table in _TABLES:
            run.forget(table)
        return []
    reports = [_train(run, ablation, overwrite) for ablation in ablations]
    folders = {ablation.name: arm_folder(run, label_of(ablation)) for ablation in ablations}
    reports.append(_pairs(run, overwrite))
    return [*reports, *held_out(run, "ablations", folders, 0, overwrite), _estimates(run, overwrite)]


def label_of(ablation: Ablation) -> str:
    """Return the name of an ablation's folder in ``training/``."""
    return "ablation-" + re.sub(r"[^a-z0-9]+", "-", ablation.name.lower()).strip("-")


def varied(profile: Profile, ablation: Ablation) -> Profile:
    """Return a profile with an ablation's settings; the weight of a signal that is left out is shared by the others."""
    changes = list(ablation.changes)
    if ablation.without is not None:
        weights = profile.scoring.weights.model_dump() | {ablation.without: 0.0}
        total = sum(weights.values())
        changes += [f"scoring.weights.{signal}={weight / total!r}" for signal, weight in weights.items()]
    return with_overrides(profile.with_corrections(*ablation.corrections), changes)


def _variant(run: RunFolder, profile: Profile) -> Variant:
    responses, scores, dialogues = (run.read(name) for name in _READS)
    return rebuild(
        responses, measured(responses, scores), dialogues, profile, ARMS[run.profile.evaluation.ablated].pairs
    )


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
        run, profile.evaluation.ablated, label_of(ablation), lambda: _variant(run, variant).pairs,
        files={name: run.path(name) for name in _READS}, profile=seeded, overwrite=overwrite,
        basis=basis | {"prompts": variant.prompts.model_dump(mode="json")},
    )  # fmt: skip


def _pairs(run: RunFolder, overwrite: bool) -> StageReport:
    """Count what became of the pairs."""
    profile, table = run.profile, "ablations/pairs"

    def build() -> Tables:
        own = pair_keys(_variant(run, profile).pairs)
        rows = []
        for ablation in profile.evaluation.ablations:
            variant = _variant(run, varied(profile, ablation))
            pairs, ranking = variant.pairs, variant.ranking
            rows.append({
                "ablation": ablation.name, "pairs": len(pairs), "prompts": pairs["dialogue_id"].nunique(),
                "shared_pairs": len(own & pair_keys(pairs)), "low": ranking.low, "high": ranking.high,
            })  # fmt: skip
        return {table: pd.DataFrame(rows)}

    settings = profile.model_dump(mode="json", include={"corrections", "prompts", "scoring", "pairs", "evaluation"})
    return run.stage("pairs of ablations", build, reads=_READS, settings=settings, outputs=[table], overwrite=overwrite)


def _estimates(run: RunFolder, overwrite: bool) -> StageReport:
    """Estimate every ablation, and compare it with the arm that they start from on the same dialogues, one seed each."""
    settings = run.profile.evaluation
    names = [f"{group}/{kind}" for group in ("evaluation", "ablations") for kind in ("responses", "scores", "judged")]

    def build() -> Tables:
        from persodpo.evaluation.observations import observe
        from persodpo.evaluation.results import compare, estimates
        from persodpo.evaluation.statistics import Resampling

        own, other = (
            observe(run.read(f"{group}/responses"), run.read(f"{group}/scores"), judged=run.read(f"{group}/judged"))
            for group in ("evaluation", "ablations")
        )
        both = pd.concat([own[own["arm"] == settings.ablated], other], ignore_index=True)
        sampling = Resampling(seed=run.profile.seed)
        pairs = [(ablation, settings.ablated) for ablation in other["arm"].unique()]
        return {
            "ablations/estimates": estimates(both, sampling),
            "ablations/comparisons": compare(both, pairs, sampling),
        }

    return run.stage(
        "ablations",
        build,
        reads=names,
        settings={"ablated": settings.ablated, "seed": run.profile.seed},
        outputs=["ablations/estimates", "ablations/comparisons"],
        overwrite=overwrite,
    )
