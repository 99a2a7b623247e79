"""From tables to results, audit and figures."""

from __future__ import annotations

import persodpo.evaluation.bootstrap
import persodpo.evaluation.comparisons
import persodpo.evaluation.observations
import persodpo.evaluation.results
import persodpo.evaluation.significance
import persodpo.evaluation.statistics
from persodpo.artifacts import RunFolder, StageReport
from persodpo.config import Profile, load_profile
from persodpo.evaluation.bootstrap import Resampling
from persodpo.evaluation.cells import comparison_table, results_table
from persodpo.evaluation.comparisons import compare
from persodpo.evaluation.exports import write_exports
from persodpo.evaluation.observations import IMPUTED, SUCCESSES, observe
from persodpo.evaluation.statistics import estimates
from persodpo.figures import FigureReport, save_figures
from persodpo.release import audit, corrections, parity, published
from persodpo.release.findings.base import Material
from persodpo.stages.ablate import run_ablate
from persodpo.stages.base import Reports, Targets, alone, published_files
from persodpo.stages.heldout import arms_of, run_heldout
from persodpo.stages.pairs import limits, run_pairs, run_score
from persodpo.stages.train import run_train
from persodpo.tables import write_table

#: Sections that do not touch what the audit judges.
_NO_CONCERN = ("policy", "training", "evaluation")


@alone
def run_evaluate(profile: Profile, overwrite: bool = False) -> Reports:
    """Make the results of the held-out responses: with intervals, paired comparisons, and as published."""
    by_arms = profile.evaluation.source == "arms"
    reports = run_heldout(profile, overwrite) if by_arms else run_score(profile)
    arms = arms_of(profile) if by_arms else None
    run = RunFolder(profile)
    tables = ["evaluation/responses", "evaluation/scores"]
    settings = profile.evaluation

    def build(targets: Targets) -> None:
        responses, scores = (run.read(name) for name in tables)
        observations = observe(responses, scores, arms)
        sampling = Resampling(settings.resamples, profile.seed)
        found = {
            "results": persodpo.evaluation.results.summarise(responses, scores),
            "estimates": estimates(observations, sampling=sampling),
            "comparisons": compare(observations, settings.pairs, sampling=sampling),
        }
        for name, table in found.items():
            write_table(targets[f"evaluation/{name}"], f"evaluation/{name}", table)

    report = run.stage(
        "evaluate",
        inputs={name: run.path(name) for name in tables},
        settings=settings.model_dump(mode="json") | {"seed": profile.seed, "arms": list(profile.training.arms)},
        outputs=["evaluation/results", "evaluation/estimates", "evaluation/comparisons"],
        code=__name__,
        build=build,
        overwrite=overwrite,
    )  # fmt: skip
    _write_exports(run)
    return [*reports, report]


def _write_exports(run: RunFolder) -> None:
    """Write the tables of the evaluation as CSV, Markdown and LaTeX; they are made anew from the tables every time."""
    found, compared = (run.read(f"evaluation/{name}") for name in ("estimates", "comparisons"))
    folder = run.path("evaluation/results").parent
    for reading, name in ((IMPUTED, "failures_imputed"), (SUCCESSES, "successes_alone")):
        write_exports(folder, name, found, results_table(found, reading))
    write_exports(folder, "paired_differences", compared, comparison_table(compared))


def as_released(profile: Profile) -> Profile:
    """Return the profile whose tables the audit judges.

    That is ``profile`` itself if its method is the released one; otherwise the shipped ``release`` profile with this
    one's folders and limits, under a name of its own, so that the tables of a corrected run stay as they are. Policy,
    training and evaluation are no concern of the audit.
    """
    released = load_profile("release")
    # How models would be asked is no concern of the audit either: only what is ranked.
    ranked = {key: getattr(released.generation, key) for key in ("source", "models")}
    generation = profile.generation.model_copy(update=ranked)
    kept = {key: getattr(profile, key) for key in ("paths", "engine", "seed", "miniature", *_NO_CONCERN)}
    twin = released.model_copy(update={**kept, "generation": generation})
    same = twin.model_dump(exclude={"name"}) == profile.model_dump(exclude={"name"})
    return profile if same else twin.model_copy(update={"name": f"{profile.name}-as-released"})


@alone
def run_audit(profile: Profile, overwrite: bool = False) -> Reports:
    """Make the parity table, the findings and the effect of every correction, on the tables as released."""
    profile = as_released(profile)
    reports = run_pairs(profile)
    run = RunFolder(profile)
    files = published_files(run)
    names = ["dialogues", "responses", "scores", "thresholds", "pairs/simple", "pairs/perso", "pairs/gate"]

    def build(targets: Targets) -> None:
        tables = {name: run.read(name) for name in names}
        low, high = limits(run)
        material = Material(files, tables, low, high, profile)
        write_table(targets["audit/parity"], "audit/parity", parity.parity_table(files, tables))
        write_table(targets["audit/findings"], "audit/findings", audit.findings_table(material))
        write_table(targets["audit/corrections"], "audit/corrections", corrections.correction_effects(material))

    report = run.stage(
        "audit",
        inputs={name: run.path(name) for name in names} | files | published.fact_files(),
        settings=profile.model_dump(mode="json", exclude={"paths", "engine", "miniature", *_NO_CONCERN}),
        outputs=["audit/parity", "audit/findings", "audit/corrections"],
        code=__name__,
        build=build,
        overwrite=overwrite,
    )
    return [*reports, report]


@alone
def run_figures(profile: Profile, overwrite: bool = False) -> list[StageReport | FigureReport]:
    """Draw the figures."""
    reports: list[StageReport | FigureReport] = [
        *run_train(profile),
        *run_evaluate(profile)[-1:],
        *run_ablate(profile)[-1:],
    ]
    return [*reports, *save_figures(RunFolder(profile), overwrite=overwrite)]
