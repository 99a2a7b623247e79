"""From responses to scores and thresholds, by published or by computed metric values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd

from persodpo import pairs
from persodpo.config import Profile
from persodpo.release import published
from persodpo.release.fetch import fetch_release
from persodpo.runfolder import RunFolder, StageReport, Tables
from persodpo.scoring import extras, factory, heads, probes
from persodpo.scoring.encoder import Encoder, remembered
from persodpo.scoring.score import Engine, ScoreCache, Scorer, Tally, computed_metrics, one_by_one

#: The responses that are ranked, and the held-out ones.
TABLES = ("scores", "evaluation/scores")
#: Under the folder of all runs, for scores and heads do not depend on a run's name; no run can be called so.
CACHE, HEADS = "_scores.sqlite", "_heads"


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
    computes = profile.scoring.source == "compute"
    kept = profile.scoring.model_dump(mode="json", exclude=set() if computes else {"compute", "encoder"})
    return {
        "scoring": kept,
        "corrections": profile.switches(
            *(("A3", "A10b", "A10c", "B1", "B2") if computes else ("A1", "A3", "B1", "B2"))
        ),
        "quantiles": [profile.pairs.low_quantile, profile.pairs.high_quantile],
        "models": list(profile.generation.models),
    }


def ranked(
    profile: Profile, responses: Mapping[str, pd.DataFrame], metrics: Mapping[str, pd.DataFrame]
) -> dict[str, pd.DataFrame]:
    """Impute, rate and rank; return both scores tables and the thresholds.

    Args:
        profile: The settings.
        responses: Responses tables, by the name of their scores table.
        metrics: Metric values of parsed responses, by the same names.
    """
    values = {
        table: pairs.impute(
            responses[table], metrics[table], unread=table != "scores", count=pairs.word_counter(profile)
        )
        for table in responses
    }
    ranking = pairs.rank(values["scores"], profile)
    scale = ranking.scale
    others = {table: pairs.rate(values[table], scale, profile) for table in responses if table != "scores"}
    named = {
        "low": ranking.low, "high": ranking.high, "target_words": scale.target_words, "mean_words": scale.mean_words,
    }  # fmt: skip
    return {"scores": ranking.scores, **others, "thresholds": pd.DataFrame(named.items(), columns=["name", "value"])}


def _extras(run: RunFolder) -> StageReport:
    """Make the extras table: what is reported beside the quality score."""

    def build() -> Tables:
        return {"extras": extras.extras_table(run.read("responses"), run.read("dialogues"))}

    return run.stage("extras", build, reads=["dialogues", "responses"], outputs=["extras"])


def _published(run: RunFolder, overwrite: bool) -> StageReport:
    """Make scores and thresholds of the published metric values."""
    profile, files = run.profile, fetch_release(run.release)
    wanted = dict(
        zip(tables_of(profile), (published.ranked_sets(profile.generation.models), published.VALID_SETS), strict=False)
    )
    answers = {table: table.replace("scores", "responses") for table in wanted}

    def build() -> Tables:
        tables = {table: run.read(name) for table, name in answers.items()}
        metrics = {table: published.published_metrics(files, sets, tables[table]) for table, sets in wanted.items()}
        for left in ("probes", "scorers"):
            run.forget(left)
        return ranked(profile, tables, metrics)

    return run.stage(
        "score",
        build,
        reads=list(answers.values()),
        files=published.set_files(files, [which for sets in wanted.values() for which in sets]),
        settings=score_settings(profile),
        outputs=["scores", "thresholds", *list(wanted)[1:]],
        overwrite=overwrite,
    )


def _computed(run: RunFolder, overwrite: bool) -> StageReport:
    """Make scores, thresholds and the reports on scorers with the profile's own scorers.

    Raises:
        PersodpoError: A scorer that failed its probes would enter the quality score and is not accepted by name, or as
            `persodpo.scoring.score.computed_metrics`.
    """
    profile, scorers = run.profile, run_scorers(run)
    wanted = tables_of(profile)
    answers = {table: table.replace("scores", "responses") for table in wanted}
    notes: list[str] = []

    def build() -> Tables:
        found = [verdict for scorer in scorers for verdict in probes.probe(scorer)]
        _warnings(profile, found)
        tables = {table: run.read(name) for table, name in answers.items()}
        metrics, reports = (
            {},
            [heads.head_report(heads_folder(run)).assign(table="heads")] if run_needs_heads(run) else [],
        )
        for table, frame in tables.items():
            metrics[table], report, tallies = measure(run, frame, scorers)
            reports.append(report.assign(table=table))
            notes.extend(f"{table}, {tally}" for tally in tallies)
        if profile.evaluation.source == "published":
            for left in set(TABLES) - set(wanted):
                run.forget(left)
        said = {"probes": pd.DataFrame(found), "scorers": pd.concat(reports, ignore_index=True)}
        return ranked(profile, tables, metrics) | said

    report = run.stage(
        "score",
        build,
        reads=["dialogues", *answers.values()],
        settings=score_settings(profile) | {"scorers": keys_of(scorers)},
        outputs=[*answers, "thresholds", "probes", "scorers"],
        overwrite=overwrite,
    )
    kept = [probes.Verdict(*row) for row in run.read("probes").itertuples(index=False)]
    return replace(report, notes=(*notes, *(f"warning: {warning}" for warning in _warnings(profile, kept))))


def _warnings(profile: Profile, found: Sequence[probes.Verdict]) -> list[str]:
    return probes.admit(found, pairs.effective_weights(profile), profile.scoring.compute.accept_failed_probes)


def keys_of(scorers: Sequence[Scorer]) -> dict[str, str]:
    """Return each scorer's key, for the provenance of what it scored."""
    return {scorer.name: scorer.key for scorer in scorers}


def run_scorers(run: RunFolder) -> list[Scorer]:
    """Return the four scorers of a run's profile, in the order of the metrics; heads are fitted if need be."""
    return factory.make_scorers(run.profile, heads_folder(run) if run_needs_heads(run) else None)


def run_needs_heads(run: RunFolder) -> bool:
    """Tell whether a run's profile scores with heads on the encoder."""
    return factory.needs_heads(run.profile)


def heads_folder(run: RunFolder) -> Path:
    """Return the heads of a run, fitted on its dialogues if need be.

    In the miniature they learn from the dialogues of its models, which are more and none of the run's.
    """
    dialogues = run.read("dialogues")
    if run.profile.dialogues.source == "miniature":
        from persodpo.miniature.models import own_dialogues
        from persodpo.stages.policy import miniature_folder

        dialogues = own_dialogues(miniature_folder(run), run.profile.miniature, run.profile.seed)
    encoder = Encoder(run.profile.scoring.encoder, run.profile.scoring.compute.batch_tokens)
    return heads.make_heads(dialogues, encoder, run.root.with_name(HEADS), run.profile.seed)


def measure(
    run: RunFolder, responses: pd.DataFrame, scorers: Sequence[Scorer]
) -> tuple[pd.DataFrame, pd.DataFrame, list[Tally]]:
    """Score responses to a run's dialogues, on a Ray cluster where ``engine.scorers`` says so, from the cache of all runs.

    Args:
        run: Its dialogues, settings and cache.
        responses: A responses table.
        scorers: From `run_scorers`, or others.

    Returns:
        As `persodpo.scoring.score.computed_metrics`.
    """
    engine: Engine = one_by_one
    if run.profile.engine.scorers == "ray":
        from persodpo.scoring.cluster import ray_engine

        folder = heads_folder(run) if run_needs_heads(run) else None
        make = partial(factory.make_scorer, profile=run.profile, heads=folder)
        engine = ray_engine(make, run.profile.engine.ray_workers)
    with ScoreCache(run.root.with_name(CACHE)) as cache, remembered():
        return computed_metrics(responses, run.read("dialogues"), scorers, cache, engine=engine)
