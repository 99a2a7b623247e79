"""From responses to scores and thresholds, by published or by computed metric values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd

import persodpo.method
from persodpo import pairs
from persodpo.config import Profile
from persodpo.release import published
from persodpo.runfolder import RunFolder, StageReport
from persodpo.scoring import computed, engine, extras, probes
from persodpo.scoring.cache import ScoreCache
from persodpo.scoring.engine import Backend
from persodpo.scoring.scorers import Scorer
from persodpo.stages.base import Need, Targets, published_files
from persodpo.tables import write_table

#: The responses that are ranked, and the held-out ones.
TABLES = ("scores", "evaluation/scores")
#: Under the folder of all runs, for scores and small scorers do not depend on a run's name; no run can be called so.
CACHE, SMALL = "_scores.sqlite", "_scorers"


def needs(_profile: Profile) -> list[Need]:
    """Return what scores follow from."""
    return [Need("generate")]


def make_scores(run: RunFolder, overwrite: bool = False) -> list[StageReport]:
    """Make the extras table, the scores tables and the thresholds."""
    computes = run.profile.scoring.source == "compute"
    return [_extras(run), (_computed if computes else _published)(run, overwrite)]


def tables_of(profile: Profile) -> tuple[str, ...]:
    """Return the scores tables that the score stage makes; where arms answer held-out prompts, that is scored later."""
    held_out_published = profile.generation.source == profile.evaluation.source == "published"
    return TABLES if held_out_published else TABLES[:1]


def score_settings(profile: Profile) -> dict[str, object]:
    """Return the settings that scores depend on, those that are not used left out."""
    kept = profile.scoring.model_dump(
        mode="json", exclude=set() if profile.scoring.source == "compute" else {"compute"}
    )
    concerned = ("A1", "A3", "B1") if profile.scoring.source == "published" else ("A3", "A10b", "A10c", "B1")
    return {
        "scoring": kept,
        "corrections": profile.switches(*concerned),
        "quantiles": [profile.pairs.low_quantile, profile.pairs.high_quantile],
        "models": list(profile.generation.models),
    }


def write_scores(
    profile: Profile, targets: Targets, responses: Mapping[str, pd.DataFrame], metrics: Mapping[str, pd.DataFrame]
) -> None:
    """Impute, rate and rank, and write both scores tables and the thresholds.

    Args:
        profile: The settings.
        targets: Paths to write, of the scores tables and of thresholds.
        responses: Responses tables, by the name of their scores table.
        metrics: Metric values of parsed responses, by the same names.
    """
    values = {
        table: pairs.impute(
            responses[table], metrics[table], unread=table != "scores", sentences_once=profile.corrects("B1")
        )
        for table in responses
    }
    ranking = pairs.rank(values["scores"], profile)
    write_table(targets["scores"], "scores", ranking.scores)
    for table in [table for table in responses if table != "scores"]:
        write_table(targets[table], table, pairs.rate(values[table], ranking.scale, profile))
    scale = ranking.scale
    named = {
        "low": ranking.low, "high": ranking.high, "target_words": scale.target_words, "mean_words": scale.mean_words,
    }  # fmt: skip
    write_table(targets["thresholds"], "thresholds", pd.DataFrame(named.items(), columns=["name", "value"]))


def _extras(run: RunFolder) -> StageReport:
    """Make the extras table: what is reported beside the quality score."""

    def build(targets: Targets) -> None:
        write_table(targets["extras"], "extras", extras.extras_table(run.read("responses"), run.read("dialogues")))

    return run.stage(
        "extras",
        inputs={name: run.path(name) for name in ("dialogues", "responses")},
        settings={},
        outputs=["extras"],
        code=__name__,
        build=build,
    )


def _published(run: RunFolder, overwrite: bool) -> StageReport:
    """Make scores and thresholds of the published metric values."""
    profile, files = run.profile, published_files(run)
    wanted = dict(
        zip(tables_of(profile), (published.ranked_sets(profile.generation.models), published.VALID_SETS), strict=False)
    )
    answers = {table: table.replace("scores", "responses") for table in wanted}

    def build(targets: Targets) -> None:
        tables = {table: run.read(name) for table, name in answers.items()}
        metrics = {table: published.published_metrics(files, sets, tables[table]) for table, sets in wanted.items()}
        write_scores(profile, targets, tables, metrics)
        for left in ("probes", "scorers"):
            run.forget(left)

    return run.stage(
        "score",
        inputs={name: run.path(name) for name in answers.values()}
        | published.set_files(files, [which for sets in wanted.values() for which in sets]),
        settings=score_settings(profile),
        outputs=["scores", "thresholds", *list(wanted)[1:]],
        code=__name__,
        build=build,
        overwrite=overwrite,
    )


def _computed(run: RunFolder, overwrite: bool) -> StageReport:
    """Make scores, thresholds and the reports on scorers with the profile's own scorers.

    Raises:
        PersodpoError: A scorer that failed its probes would enter the quality score and is not accepted by name, or as
            `persodpo.scoring.computed.computed_metrics`.
    """
    profile, small = run.profile, small_scorers(run)
    scorers = _scorers(profile, small)
    wanted = tables_of(profile)
    answers = {table: table.replace("scores", "responses") for table in wanted}
    notes: list[str] = []

    def build(targets: Targets) -> None:
        with ScoreCache(score_cache(run)) as cache:
            found = [verdict for scorer in scorers for verdict in probes.probe_once(scorer, cache)]
            _warnings(profile, found)
            tables = {table: run.read(name) for table, name in answers.items()}
            with backend_of(profile, small) as backend:
                metrics, reports = _compute(run, tables, scorers, cache, backend=backend, notes=notes)
        write_scores(profile, targets, tables, metrics)
        write_table(targets["probes"], "probes", pd.DataFrame(found))
        write_table(targets["scorers"], "scorers", reports)
        if profile.evaluation.source == "published":
            for left in set(TABLES) - set(wanted):
                run.forget(left)

    report = run.stage(
        "score",
        inputs={name: run.path(name) for name in ("dialogues", *answers.values())}
        | computed.model_files(profile.scoring.compute, small),
        settings=score_settings(profile) | {"scorers": {one.name: dict(one.identity()) for one in scorers}},
        outputs=[*answers, "thresholds", "probes", "scorers"],
        code=__name__,
        build=build,
        overwrite=overwrite,
    )
    kept = [probes.Verdict(*row) for row in run.read("probes").itertuples(index=False)]
    return replace(report, notes=(*notes, *(f"warning: {warning}" for warning in _warnings(profile, kept))))


def _warnings(profile: Profile, found: Sequence[probes.Verdict]) -> list[str]:
    accepted = profile.scoring.compute.accept_failed_probes
    return probes.admit(found, pairs.effective_weights(profile), accepted)


def run_scorers(run: RunFolder) -> list[Scorer]:
    """Return the four scorers of a run's profile, in the order of the metrics; small models are made if need be."""
    return _scorers(run.profile, small_scorers(run))


def _scorers(profile: Profile, small: Mapping[str, str]) -> list[Scorer]:
    return [computed.make_scorer(metric, profile, small) for metric in persodpo.method.METRICS]


def score_cache(run: RunFolder) -> Path:
    """Return the file that keeps the scores of all runs beside this one."""
    return run.root.with_name(CACHE)


def small_scorers(run: RunFolder) -> dict[str, str]:
    """Return the small models that the profile asks for, by metric, made if need be.

    They learn from the run's dialogues; in the miniature from those of its models, which are more and none of the run's.
    """
    wanted = computed.small_models(run.profile.scoring.compute)
    if not wanted:
        return {}
    from persodpo.scoring.small import SmallScorers, make_small_scorers  # noqa: PLC0415 - torch is slow to load

    dialogues = run.read("dialogues")
    if run.profile.dialogues.source == "miniature":
        from persodpo.miniature.models import own_dialogues  # noqa: PLC0415 - the same
        from persodpo.stages.policy import miniature_folder  # noqa: PLC0415

        dialogues = own_dialogues(miniature_folder(run), run.profile.miniature, run.profile.seed)
    settings = SmallScorers.of(run.profile.scoring.compute.small_examples, run.profile.seed)
    made = make_small_scorers(dialogues, run.root.with_name(SMALL), settings)
    places = {"coherence": made.coherence, "c_score": made.nli, "ue_score": made.nli, "persona_distance": made.vectors}
    return {metric: str(places[metric]) for metric in wanted}


@contextmanager
def backend_of(profile: Profile, small: Mapping[str, str]) -> Iterator[Backend]:
    """Give what scores batches under a profile: this process, or a Ray cluster.

    Raises:
        PersodpoError: Ray is asked for and not installed.
    """
    if profile.engine.scorers == "local":
        yield engine.LOCAL
        return
    from persodpo.scoring.ray_engine import RayBackend  # noqa: PLC0415 - optional

    make = partial(computed.make_scorer, profile=profile, small=small)
    with RayBackend(make, profile.engine.ray_workers) as backend:
        yield backend


def _compute(
    run: RunFolder,
    tables: Mapping[str, pd.DataFrame],
    scorers: Sequence[Scorer],
    cache: ScoreCache,
    *,
    backend: Backend,
    notes: list[str],
) -> tuple[dict[str, pd.DataFrame], pd.DataFrame]:
    """Score both tables; notes what was cut, unknown and cached."""
    dialogues = run.read("dialogues")
    metrics, reports = {}, []
    for table, frame in tables.items():
        metrics[table], report, tallies = computed.computed_metrics(frame, dialogues, scorers, cache, backend=backend)
        reports.append(report.assign(table=table))
        notes.extend(f"{table}, {tally}" for tally in tallies)
    return metrics, pd.concat(reports, ignore_index=True)
