"""From held-out responses to results."""

from __future__ import annotations

from persodpo.config import Profile
from persodpo.errors import PersodpoError
from persodpo.evaluation.bootstrap import Resampling
from persodpo.evaluation.exports import comparison_table, results_table, write_exports
from persodpo.evaluation.observations import IMPUTED, SUCCESSES, observe
from persodpo.evaluation.results import compare, estimates, summarise
from persodpo.runfolder import RunFolder, StageReport
from persodpo.stages.base import Need, Targets
from persodpo.stages.heldout import arms_of, held_out_arms, judge_held_out
from persodpo.tables import write_table


def needs(profile: Profile) -> list[Need]:
    """Return what results follow from: arms under all seeds, or the published held-out responses.

    Raises:
        PersodpoError: Arms answer, and the scores are the published ones.
    """
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
    reports = held_out_arms(run, overwrite) if by_arms else [judge_held_out(run, *tables[::2], overwrite=overwrite)]

    def build(targets: Targets) -> None:
        responses, scores, judged = (run.read(name) for name in tables)
        observations = observe(responses, scores, arms, judged)
        sampling = Resampling(settings.resamples, profile.seed)
        results = {
            "results": summarise(responses, scores),
            "estimates": estimates(observations, sampling),
            "comparisons": compare(observations, settings.pairs, sampling),
        }
        for name, table in results.items():
            write_table(targets[f"evaluation/{name}"], f"evaluation/{name}", table)

    report = run.stage(
        "evaluate",
        inputs={name: run.path(name) for name in tables},
        settings=settings.model_dump(mode="json") | {"seed": profile.seed, "arms": list(profile.training.arms)},
        outputs=["evaluation/results", "evaluation/estimates", "evaluation/comparisons"],
        code=__name__,
        build=build,
        overwrite=overwrite,
    )
    return [*reports, report]


def after(run: RunFolder) -> list[str]:
    """Write the tables of the evaluation as CSV, Markdown and LaTeX; they are made anew from the tables every time."""
    estimated, compared = (run.read(f"evaluation/{name}") for name in ("estimates", "comparisons"))
    folder = run.path("evaluation/results").parent
    for reading, name in ((IMPUTED, "failures_imputed"), (SUCCESSES, "successes_alone")):
        write_exports(folder, name, estimated, results_table(estimated, reading))
    write_exports(folder, "paired_differences", compared, comparison_table(compared))
    return []
