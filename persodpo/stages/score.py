"""From responses to scores and thresholds, by published or by computed metric values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import pandas as pd

from persodpo import pairs
from persodpo.config import ENCODER, Profile
from persodpo.method import METRICS
from persodpo.miniature.models import own_dialogues
from persodpo.release import published
from persodpo.release.fetch import fetch_release
from persodpo.runfolder import RunFolder, StageReport, Tables
from persodpo.scoring import extras, heads, probes
from persodpo.scoring.coherence import CoherenceScorer
from persodpo.scoring.encoder import Encoder, remembered
from persodpo.scoring.heads import CoherenceHead, Head
from persodpo.scoring.nli import CScorer, NliModel, UEScorer, Way
from persodpo.scoring.persona import PersonaDistance, WordMeans
from persodpo.scoring.score import Engine, ScoreCache, Scorer, Tally, computed_metrics, one_by_one
from persodpo.stages.policy import miniature_folder

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
    """Impute, rate and rank; return scores tables and thresholds.

    Args:
        profile: The settings.
        responses: Responses tables, by the name of their scores table.
        metrics: Metric values of parsed responses, by the same names.
    """
    count = pairs.word_counter(profile)
    values = {
        table: pairs.impute(frame, metrics[table], unread=table != "scores", count=count)
        for table, frame in responses.items()
    }
    ranking = pairs.rank(values.pop("scores"), profile)
    scale = ranking.scale
    others = {table: pairs.rate(frame, scale, profile) for table, frame in values.items()}
    named = {
        "low": ranking.low, "high": ranking.high, "target_words": scale.target_words, "mean_words": scale.mean_words,
    }  # fmt: skip
    thresholds = pd.DataFrame(named.items(), columns=["name", "value"])
    return {"scores": ranking.scores, **others, "thresholds": thresholds}


def _extras(run: RunFolder) -> StageReport:
    """Make the extras table: what is reported beside the quality score."""

    def build() -> Tables:
        return {"extras": extras.extras_table(run.read("responses"), run.read("dialogues"))}

    return run.stage("extras", build, reads=["dialogues", "responses"], outputs=["extras"])


def _published(run: RunFolder, overwrite: bool) -> StageReport:
    """Make scores and thresholds of the published metric values."""
    profile, files = run.profile, fetch_release(run.release)
    all_sets = (published.ranked_sets(profile.generation.models), published.VALID_SETS)
    sets = dict(zip(tables_of(profile), all_sets, strict=False))
    answers = {table: table.replace("scores", "responses") for table in sets}

    def build() -> Tables:
        tables = {table: run.read(name) for table, name in answers.items()}
        metrics = {table: published.published_metrics(files, which, tables[table]) for table, which in sets.items()}
        for left in ("probes", "scorers"):
            run.forget(left)
        return ranked(profile, tables, metrics)

    return run.stage(
        "score",
        build,
        reads=list(answers.values()),
        files=published.set_files(files, [each for which in sets.values() for each in which]),
        settings=score_settings(profile),
        outputs=[*sets, "thresholds"],
        overwrite=overwrite,
    )


def _computed(run: RunFolder, overwrite: bool) -> StageReport:
    """Make scores, thresholds and the reports on scorers with the profile's own scorers.

    Raises:
        PersodpoError: A scorer that failed its probes would enter the quality score and is not accepted by name.
    """
    profile, scorers = run.profile, run_scorers(run)
    answers = {table: table.replace("scores", "responses") for table in tables_of(profile)}
    notes: list[str] = []

    def build() -> Tables:
        verdicts = [verdict for scorer in scorers for verdict in probes.probe(scorer)]
        _warnings(profile, verdicts)
        tables = {table: run.read(name) for table, name in answers.items()}
        reports = [heads.head_report(heads_folder(run)).assign(table="heads")] if needs_heads(profile) else []
        metrics = {}
        for table, frame in tables.items():
            metrics[table], report, tallies = measure(run, frame, scorers)
            reports.append(report.assign(table=table))
            notes.extend(f"{table}, {tally}" for tally in tallies)
        if profile.evaluation.source == "published":
            for left in set(TABLES) - set(answers):
                run.forget(left)
        said = {"probes": pd.DataFrame(verdicts), "scorers": pd.concat(reports, ignore_index=True)}
        return ranked(profile, tables, metrics) | said

    report = run.stage(
        "score",
        build,
        reads=["dialogues", *answers.values()],
        settings=score_settings(profile) | {"scorers": keys_of(scorers)},
        outputs=[*answers, "thresholds", "probes", "scorers"],
        overwrite=overwrite,
    )
    verdicts = list(verdicts_on(run, scorers))
    return replace(report, notes=(*notes, *(f"warning: {warning}" for warning in _warnings(profile, verdicts))))


def verdicts_on(run: RunFolder, scorers: Sequence[Scorer]) -> Iterator[probes.Verdict]:
    """Yield what probes say of scorers: from the run's table where it has the very scorer, else anew."""
    made = run.provenance("probes").get("settings", {}).get("scorers", {})
    kept = [probes.Verdict(*row) for row in run.read("probes").itertuples(index=False)] if made else []
    for scorer in scorers:
        own = [verdict for verdict in kept if verdict.scorer == scorer.name]
        yield from own if made.get(scorer.name) == scorer.key else probes.probe(scorer)


def _warnings(profile: Profile, verdicts: Sequence[probes.Verdict]) -> list[str]:
    return probes.admit(verdicts, pairs.effective_weights(profile), profile.scoring.compute.accept_failed_probes)


def keys_of(scorers: Sequence[Scorer]) -> dict[str, str]:
    """Return each scorer's key, for the provenance of what it scored."""
    return {scorer.name: scorer.key for scorer in scorers}


def run_scorers(run: RunFolder) -> list[Scorer]:
    """Return the four scorers of a run's profile, in the order of the metrics; heads are fitted if need be."""
    folder = heads_folder(run) if needs_heads(run.profile) else None
    return [make_scorer(metric, run.profile, folder) for metric in METRICS]


def needs_heads(profile: Profile) -> bool:
    """Tell whether a profile scores with heads on the encoder."""
    models = profile.scoring.compute.models
    return ENCODER in (models.coherence, models.c_score, models.ue_score)


def make_scorer(name: str, profile: Profile, folder: Path | None) -> Scorer:
    """Return one scorer of a profile.

    Args:
        name: The metric.
        profile: Models, their settings and corrections.
        folder: What `persodpo.scoring.heads.make_heads` returned, where `needs_heads`.
    """
    settings = profile.scoring.compute
    model, size = getattr(settings.models, name), settings.batch_tokens
    way: Way = "corrected" if profile.corrects("A10c" if name == "persona_distance" else "A10b") else "as_released"
    if name == "persona_distance":
        if model != ENCODER and Path(model).is_file():
            return PersonaDistance(WordMeans(Path(model), way), way)
        return PersonaDistance(encoder_of(profile) if model == ENCODER else open_encoder(model, size), way)
    head = Head.load(name, encoder_of(profile), folder) if model == ENCODER and folder else None
    if name == "coherence":
        return CoherenceHead(head) if head else CoherenceScorer(model, size)
    labels = settings.labels.get("c_score" if name == "c_score" else "ue_score")
    classifier = head or NliModel(model, labels=labels, batch_tokens=size)
    return (CScorer if name == "c_score" else UEScorer)(classifier, way)


def encoder_of(profile: Profile) -> Encoder:
    """Return the frozen encoder of a profile, one for all its scorers."""
    return open_encoder(profile.scoring.encoder, profile.scoring.compute.batch_tokens)


@lru_cache(maxsize=4)
def open_encoder(name: str, batch_tokens: int) -> Encoder:
    """Return an encoder that is hashed and loaded once in this process."""
    return Encoder(name, batch_tokens)


def heads_folder(run: RunFolder) -> Path:
    """Return the heads of a run, fitted on its dialogues if need be.

    In the miniature they learn from the dialogues of its models, which are more and none of the run's.
    """
    dialogues = run.read("dialogues")
    if run.profile.dialogues.source == "miniature":
        dialogues = own_dialogues(miniature_folder(run), run.profile.miniature, run.profile.seed)
    return heads.make_heads(dialogues, encoder_of(run.profile), run.root.with_name(HEADS), run.profile.seed)


def measure(
    run: RunFolder, responses: pd.DataFrame, scorers: Sequence[Scorer]
) -> tuple[pd.DataFrame, pd.DataFrame, list[Tally]]:
    """Score responses to a run's dialogues, on a Ray cluster under ``engine.ray_workers``, from the cache of all runs.

    Args:
        run: Its dialogues, settings and cache.
        responses: A responses table.
        scorers: From `run_scorers`, or others.

    Returns:
        As `persodpo.scoring.score.computed_metrics`.
    """
    engine: Engine = one_by_one
    if run.profile.engine.ray_workers:
        from persodpo.scoring.cluster import ray_engine

        folder = heads_folder(run) if needs_heads(run.profile) else None
        engine = ray_engine(partial(make_scorer, profile=run.profile, folder=folder), run.profile.engine.ray_workers)
    with ScoreCache(run.root.with_name(CACHE)) as cache, remembered():
        return computed_metrics(responses, run.read("dialogues"), scorers, cache, engine)
