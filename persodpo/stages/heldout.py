"""From trained arms to scored held-out responses: the starting policy and every arm answer the same prompts.

All are asked in the same way, the profile's, whatever their pairs were made with; what differs is the training alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pandas as pd

from persodpo import pairs
from persodpo.completions import repeats_sentence
from persodpo.config import Profile, TransformersModel
from persodpo.errors import PersodpoError
from persodpo.generation.ask import generate_all
from persodpo.generation.requests import Job
from persodpo.generation.store import Store
from persodpo.generation.summary import stored_answers
from persodpo.miniature.judge import judge
from persodpo.runfolder import RunFolder, StageReport
from persodpo.scoring import extras
from persodpo.stages import score
from persodpo.stages.asking import job_for
from persodpo.stages.base import Targets
from persodpo.stages.generate import check_finished, write_answers
from persodpo.stages.policy import start_policy
from persodpo.stages.train import arm_folder
from persodpo.tables import SCHEMAS, with_none, write_table
from persodpo.training.arms import label_of

#: Name of the policy that all arms start from, among the arms.
BASE = "base"
#: Prompts that an arm answers together where no response time is taken; the decoder halves it where memory runs out.
BATCH_SIZE = 32


def held_out_arms(run: RunFolder, overwrite: bool = False) -> list[StageReport]:
    """Let the starting policy and all arms under all seeds answer the held-out prompts, and score what they say.

    Raises:
        PersodpoError: There are no held-out dialogues, or a model has stopped.
    """
    profile = run.profile
    models = {
        model: start_policy(run) if model == BASE else arm_folder(run, model) for model in arms_of(profile)["model"]
    }
    answers = answer_held_out(run, "evaluation/responses", models, profile.evaluation.timed, overwrite=overwrite)
    return [
        answers,
        score_held_out(run, "evaluation/responses", "evaluation/scores", overwrite=overwrite),
        judge_held_out(run, "evaluation/responses", "evaluation/judged", overwrite=overwrite),
    ]


def arms_of(profile: Profile) -> pd.DataFrame:
    """Return which arm and seed each model of the held-out responses is, for `persodpo.evaluation.observations.observe`.

    Returns:
        Columns model, arm and seed; the starting policy has the seed 0, for no seed of a training touches it.
    """
    rows = [(BASE, BASE, 0)]
    for arm in profile.training.arms:
        rows += [(label_of(arm, seed, profile.evaluation.seeds), arm, seed) for seed in profile.evaluation.seeds]
    return pd.DataFrame(rows, columns=["model", "arm", "seed"])


def answer_held_out(
    run: RunFolder, table: str, models: Mapping[str, str | Path], timed: int | None, *, overwrite: bool = False
) -> StageReport:
    """Let models answer what is not stored yet.

    Args:
        run: The run folder.
        table: The responses table to write.
        models: Folder or Hub name of each, by its name in the table.
        timed: Dialogues that are answered one at a time, for response times; None: all of them.
        overwrite: Write the table even if it is written already.

    Returns:
        What was done.

    Raises:
        PersodpoError: There are no held-out dialogues, or a model has stopped.
    """
    profile = run.profile
    dialogues = run.read("dialogues").query("split == 'valid'")
    if dialogues.empty:
        raise PersodpoError("There are no held-out dialogues to answer; give the profile a valid split.")
    with Store(run.answers) as store:
        jobs = list(_jobs(run, dialogues, models, timed))
        summaries = generate_all([job for job, _ in jobs], store, reading=profile.reading)
        check_finished(summaries, profile, "evaluate")
        frame = stored_answers(store, list(_jobs(run, dialogues, models, timed)), profile.reading)
    # Answers of many at a time have no response time of their own.
    frame["response_time"] = frame["response_time"].where(frame["batch_size"] == 1)
    return write_answers(run, table, frame, overwrite=overwrite)


def _jobs(
    run: RunFolder, dialogues: pd.DataFrame, models: Mapping[str, str | Path], timed: int | None
) -> Iterator[tuple[Job, list[str]]]:
    """Yield what each model answers: the first dialogues one at a time, and the others together."""
    first = len(dialogues) if timed is None else timed
    for model, weights in models.items():
        for mode, part in (("latency", dialogues.iloc[:first]), ("throughput", dialogues.iloc[first:])):
            if part.empty:
                continue
            entry = _entry(model, weights, mode, BATCH_SIZE)
            yield job_for(part, entry, run.profile, weights), part["split"].tolist()


def _entry(model: str, weights: str | Path, mode: str, batch_size: int) -> TransformersModel:
    fields = {"kind": "transformers", "model": model, "weights": str(weights), "mode": mode, "batch_size": batch_size}
    return TransformersModel.model_validate(fields)


def judge_held_out(run: RunFolder, answers: str, table: str, *, overwrite: bool = False) -> StageReport:
    """Judge held-out responses by what no pair set was made from: references, and the generated world where there is one.

    Args:
        run: The run folder.
        answers: The responses table to judge.
        table: The table to write.
        overwrite: Judge even if nothing changed.

    Returns:
        What was done.
    """
    generated = run.profile.dialogues.source == "miniature"

    def build(targets: Targets) -> None:
        responses, dialogues = run.read(answers), run.read("dialogues")
        overlap = extras.extras_table(responses, dialogues)["rouge_l"].where(responses["outcome"] == "ok", 0.0)
        repeats = [repeats_sentence(text or "") for text in with_none(responses)["response"]]
        frame = responses[["dialogue_id", "model"]].assign(rouge_l=overlap, repeats=repeats)
        if generated:
            frame = frame.merge(judge(dialogues, responses), on=["dialogue_id", "model"], validate="one_to_one")
        write_table(targets[table], table, frame.reindex(columns=SCHEMAS[table].names))

    return run.stage(
        f"judge {answers}",
        inputs={name: run.path(name) for name in ("dialogues", answers)},
        settings={"generated": generated},
        outputs=[table],
        code=__name__,
        build=build,
        overwrite=overwrite,
    )


def score_held_out(run: RunFolder, answers: str, table: str, *, overwrite: bool = False) -> StageReport:
    """Score held-out responses on the scale of the ranked ones, with the same scorers.

    Args:
        run: The run folder.
        answers: The responses table to score.
        table: The scores table to write.
        overwrite: Score even if nothing changed.

    Returns:
        What was done.
    """
    profile, names = run.profile, ("dialogues", "scores", answers)
    scorers = score.run_scorers(run)

    def build(targets: Targets) -> None:
        responses, ranked = run.read(answers), run.read("scores")
        metrics, _, _ = score.measure(run, responses, scorers)
        values = pairs.impute(responses, metrics, unread=True, count=pairs.word_counter(profile))
        scale = pairs.scale_of(ranked, profile.scoring)
        write_table(targets[table], table, pairs.rate(values, scale, profile))

    return run.stage(
        f"score {answers}",
        inputs={name: run.path(name) for name in names},
        settings=score.score_settings(profile) | {"scorers": score.keys_of(scorers)},
        outputs=[table],
        code=__name__,
        build=build,
        overwrite=overwrite,
    )
