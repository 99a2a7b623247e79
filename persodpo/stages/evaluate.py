"""From held-out responses to results."""

from __future__ import annotations

from persodpo.config import Profile
from persodpo.errors import PersodpoError
from persodpo.runfolder import RunFolder, StageReport, Tables
from persodpo.stages.base import Need
from persodpo.stages.heldout import arms_of, held_out_arms, judge_held_out


def needs(profile: Profile) -> list[Need]:
    """Return what results follow from: arms under all seeds, or the published held-out responses."""
    if profile.evaluation.source == "published":
        return [Need("score")]
    if profile.scoring.source != "compute":
        raise PersodpoError(
            "evaluation.source arms has responses that nobody has published scores of; set scoring.source=compute."
        )
    return [Need("train", options={"seeds": profile.evaluation.seeds})]


def evaluate(run: RunFolder, overwrite: bool = False) -> list[StageReport]:
    """Make the results of the held-out responses: with intervals, paired comparisons, and as published."""
    profile, settings = run.profile, run.profile.evaluation
    by_arms = settings.source == "arms"
    arms = arms_of(profile) if by_arms else None
    tables = ["evaluation/responses", "evaluation/scores", "evaluation/judged"]
    reports = held_out_arms(run, overwrite) if by_arms else [judge_held_out(run, "evaluation", overwrite)]

    def build() -> Tables:
        from persodpo.evaluation.observations import observe
        from persodpo.evaluation.results import compare, estimates, summarise
        from persodpo.evaluation.statistics import Resampling

        responses, scores, judged = (run.read(name) for name in tables)
        observations = observe(responses, scores, arms, judged)
        sampling = Resampling(seed=profile.seed)
        return {
            "evaluation/results": summarise(responses, scores),
            "evaluation/estimates": estimates(observations, sampling),
            "evaluation/comparisons": compare(observations, settings.pairs, sampling),
        }

    report = run.stage(
        "evaluate",
        build,
        reads=tables,
        settings=settings.model_dump(mode="json") | {"seed": profile.seed, "arms": list(profile.training.arms)},
        outputs=["evaluation/results", "evaluation/estimates", "evaluation/comparisons"],
        overwrite=overwrite,
    )
    return [*reports, report]


def after(run: RunFolder) -> list[str]:
    """Write the tables of the evaluation as CSV, Markdown and LaTeX; they are made anew from the tables every time."""
    from persodpo.evaluation.exports import comparison_table, results_table, write_exports
    from persodpo.evaluation.observations import IMPUTED, SUCCESSES

    estimated, compared = (run.read(f"evaluation/{name}") for name in ("estimates", "comparisons"))
    folder = run.path("evaluation/results").parent
    for reading, name in ((IMPUTED, "failures_imputed"), (SUCCESSES, "successes_alone")):
        write_exports(folder, name, estimated, results_table(estimated, reading))
    write_exports(folder, "paired_differences", compared, comparison_table(compared))
    run.files |= {path for path in folder.iterdir() if path.suffix in {".csv", ".md", ".tex"}}
    return []
