"""From responses to scores and thresholds, by published or by computed metric values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import pandas as pd

from persodpo import pairs
from persodpo.config import ENCODER, Profile
from persodpo.files import place_of
from persodpo.method import METRICS
from persodpo.miniature.models import own_dialogues
from persodpo.release import published
from persodpo.release.fetch import fetch_release
from persodpo.runfolder import RunFolder, StageReport, Tables
from persodpo.scoring import heads, probes
from persodpo.scoring.heads import CoherenceHead, Head
from persodpo.scoring.models import Encoder, remembered
from persodpo.scoring.score import (
    Engine,
    ScoreCache,
    Scorer,
    Tally,
    Way,
    computed_metrics,
    extras_table,
    one_by_one,
    ray_engine,
)
from persodpo.scoring.signals import Classifier, CoherenceScorer, CScorer, NliModel, PersonaDistance, UEScorer
from persodpo.scoring.words import WordMeans
from persodpo.stages.policy import miniature_folder

#: Under the folder of all runs, for scores and heads do not depend on a run's name; no run can be called so.
CACHE, HEADS = "_scores.sqlite", "_heads"
#: Settings of scoring that published values do not depend on.
NOT_COMPUTED = {"models", "encoder", "accept_failed_probes", "ray_workers"}


def make_scores(run: RunFolder, overwrite: bool = False) -> list[StageReport]:
    """Make the extras table, the scores tables and the thresholds.

    Held-out responses are scored here where they are published; those of arms are scored later.
    """
    profile = run.profile
    extras = run.stage(
        "extras",
        lambda: {"extras": extras_table(run.read("responses"), run.read("dialogues"))},
        reads=["dialogues", "responses"],
        outputs=["extras"],
    )
    answers = {"scores": "responses"}
    if profile.generation.source == profile.evaluation.source == "published":
        answers["evaluation/scores"] = "evaluation/responses"
    return [extras, (_computed if profile.scoring.source == "compute" else _published)(run, answers, overwrite)]


def score_settings(profile: Profile, scorers: Sequence[Scorer] = ()) -> dict[str, object]:
    """Return the settings that scores depend on, those that are not used left out, and the keys of computing scorers."""
    computes = profile.scoring.source == "compute"
    of_scoring = profile.scoring.model_dump(mode="json", exclude=NOT_COMPUTED if not computes else {"ray_workers"})
    settings: dict[str, object] = {
        "scoring": of_scoring,
        "corrections": profile.switches(
            *(("A3", "A10b", "A10c", "B1", "B2") if computes else ("A1", "A3", "B1", "B2"))
        ),
        "quantiles": [profile.pairs.low_quantile, profile.pairs.high_quantile],
        "models": list(profile.generation.models),
    }
    return settings | ({"scorers": {scorer.name: scorer.key for scorer in scorers}} if scorers else {})


def ranked(
    profile: Profile, responses: Mapping[str, pd.DataFrame], metrics: Mapping[str, pd.DataFrame]
) -> dict[str, pd.DataFrame]:
    """Impute, rate and rank responses by their metric values, both by the name of their scores table.

    Returns:
        Scores tables and thresholds.
    """
    count = pairs.word_counter(profile)
    values = {
        table: pairs.impute(frame, metrics[table], unread=table != "scores", count=count)
        for table, frame in responses.items()
    }
    ranking = pairs.rank(values.pop("scores"), profile)
    scale = ranking.scale
    others = {table: pairs.rate(frame, scale, profile) for table, frame in values.items()}
    by_name = {
        "low": ranking.low, "high": ranking.high, "target_words": scale.target_words, "mean_words": scale.mean_words,
    }  # fmt: skip
    thresholds = pd.DataFrame(by_name.items(), columns=["name", "value"])
    return {"scores": ranking.scores, **others, "thresholds": thresholds}


def _published(run: RunFolder, answers: Mapping[str, str], overwrite: bool) -> StageReport:
    """Make scores and thresholds of the published metric values."""
    profile, files = run.profile, fetch_release(run.release)
    sets = {"scores": published.ranked_sets(profile.generation.models), "evaluation/scores": published.VALID_SETS}
    sets = {table: sets[table] for table in answers}

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
        outputs=[*answers, "thresholds"],
        overwrite=overwrite,
    )


def _computed(run: RunFolder, answers: Mapping[str, str], overwrite: bool) -> StageReport:
    """Make scores, thresholds and the reports on scorers; `probes.admit` says which scorers may enter the quality score."""
    profile, scorers = run.profile, run_scorers(run)
    weights, accepted = pairs.effective_weights(profile), profile.scoring.accept_failed_probes
    notes: list[str] = []

    def build() -> Tables:
        verdicts = [verdict for scorer in scorers for verdict in probes.probe(scorer)]
        probes.admit(verdicts, weights, accepted)
        tables = {table: run.read(name) for table, name in answers.items()}
        reports = [heads.head_report(heads_folder(run)).assign(table="heads")] if needs_heads(profile) else []
        metrics = {}
        for table, frame in tables.items():
            metrics[table], report, tallies = measure(run, frame, scorers)
            reports.append(report.assign(table=table))
            notes.extend(f"{table}, {tally}" for tally in tallies)
        if profile.evaluation.source == "published" and "evaluation/scores" not in answers:
            run.forget("evaluation/scores")
        verdict_tables = {"probes": pd.DataFrame(verdicts), "scorers": pd.concat(reports, ignore_index=True)}
        return ranked(profile, tables, metrics) | verdict_tables

    report = run.stage(
        "score",
        build,
        reads=["dialogues", *answers.values()],
        settings=score_settings(profile, scorers),
        outputs=[*answers, "thresholds", "probes", "scorers"],
        overwrite=overwrite,
    )
    warnings = probes.admit(list(verdicts_on(run, scorers)), weights, accepted)
    return replace(report, notes=(*notes, *(f"warning: {warning}" for warning in warnings)))


def verdicts_on(run: RunFolder, scorers: Sequence[Scorer]) -> Iterator[probes.Verdict]:
    """Yield what probes say of scorers: from the run's table where it has the very scorer, else anew."""
    scorers_before = run.provenance("probes").get("settings", {}).get("scorers", {})
    verdicts_before = (
        [probes.Verdict(*row) for row in run.read("probes").itertuples(index=False)] if scorers_before else []
    )
    for scorer in scorers:
        own = [verdict for verdict in verdicts_before if verdict.scorer == scorer.name]
        yield from own if scorers_before.get(scorer.name) == scorer.key else probes.probe(scorer)


def run_scorers(run: RunFolder) -> list[Scorer]:
    """Return the four scorers of a run's profile, in the order of the metrics; heads are fitted if need be."""
    make = _maker(run)
    return [make(metric) for metric in METRICS]


def needs_heads(profile: Profile) -> bool:
    """Tell whether a profile scores with heads on the encoder."""
    models = profile.scoring.models
    return ENCODER in (models.coherence, models.c_score, models.ue_score)


def _maker(run: RunFolder) -> Callable[[str], Scorer]:
    folder = heads_folder(run) if needs_heads(run.profile) else None
    return partial(make_scorer, profile=run.profile, folder=folder)


def make_scorer(name: str, profile: Profile, folder: Path | None) -> Scorer:
    """Return a profile's scorer of a metric; the folder is that of `heads.make_heads`, where `needs_heads`."""
    model = place_of(getattr(profile.scoring.models, name))
    way: Way = "corrected" if profile.corrects("A10c" if name == "persona_distance" else "A10b") else "as_released"
    if name == "persona_distance":
        source = place_of(profile.scoring.encoder) if model == ENCODER else model
        return PersonaDistance(WordMeans(Path(source), way) if Path(source).is_file() else open_encoder(source), way)
    if name == "coherence":
        if model == ENCODER and folder:
            return CoherenceHead.load(name, encoder_of(profile), folder)
        return CoherenceScorer(model)
    on_encoder = folder if model == ENCODER else None
    classifier: Classifier = Head.load(name, encoder_of(profile), on_encoder) if on_encoder else NliModel(model)
    return (CScorer if name == "c_score" else UEScorer)(classifier, way)


def encoder_of(profile: Profile) -> Encoder:
    """Return the frozen encoder of a profile, one for all its scorers."""
    return open_encoder(place_of(profile.scoring.encoder))


@lru_cache(maxsize=4)
def open_encoder(name: str) -> Encoder:
    """Return an encoder that is hashed and loaded once in this process."""
    return Encoder(name)


def heads_folder(run: RunFolder) -> Path:
    """Return the heads of a run, fitted on its dialogues if need be.

    In the miniature they learn from the dialogues of its models, which are more and none of the run's.
    """
    dialogues = run.read("dialogues")
    if run.profile.dialogues.source == "miniature":
        dialogues = own_dialogues(miniature_folder(run), run.profile.seed)
    return heads.make_heads(dialogues, encoder_of(run.profile), run.root.with_name(HEADS), run.profile.seed)


def measure(
    run: RunFolder, responses: pd.DataFrame, scorers: Sequence[Scorer]
) -> tuple[pd.DataFrame, pd.DataFrame, list[Tally]]:
    """Score responses to a run's dialogues, on a Ray cluster under ``scoring.ray_workers``, from the cache of all runs.

    Returns:
        As `persodpo.scoring.score.computed_metrics`.
    """
    workers = run.profile.scoring.ray_workers
    engine: Engine = ray_engine(_maker(run), workers) if workers else one_by_one
    with ScoreCache(run.root.with_name(CACHE)) as cache, remembered():
        return computed_metrics(responses, run.read("dialogues"), scorers, cache, engine)
