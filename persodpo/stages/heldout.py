"""From trained arms to judged and scored held-out responses: the starting policy and every arm answer the same prompts.

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
from persodpo.runfolder import RunFolder, StageReport, Tables
from persodpo.scoring.score import extras_table
from persodpo.stages import score
from persodpo.stages.generate import check_finished, job_for, write_answers
from persodpo.stages.policy import start_policy
from persodpo.stages.train import arm_folder, weights_of
from persodpo.tables import SCHEMAS
from persodpo.training.arms import label_of

#: Name of the policy that all arms start from, among the arms.
BASE = "base"
#: Prompts that an arm answers together where no response time is taken; the decoder halves it where memory runs out.
BATCH_SIZE = 32


def arms_of(profile: Profile) -> pd.DataFrame:
    """Return which arm and seed each model of the held-out responses is: columns model, arm and seed.

    The starting policy has the seed 0, for no seed of a training touches it.
    """
    rows = [(BASE, BASE, 0)]
    for arm in profile.training.arms:
        rows += [(label_of(arm, seed, profile.evaluation.seeds), arm, seed) for seed in profile.evaluation.seeds]
    return pd.DataFrame(rows, columns=["model", "arm", "seed"])


def held_out_arms(run: RunFolder, overwrite: bool = False) -> list[StageReport]:
    """Let the starting policy and all arms under all seeds answer the held-out prompts, and score what they say."""
    models = {
        name: start_policy(run) if name == BASE else arm_folder(run, name) for name in arms_of(run.profile)["model"]
    }
    return held_out(run, "evaluation", models, run.profile.evaluation.timed, overwrite)


def held_out(
    run: RunFolder, group: str, models: Mapping[str, str | Path], timed: int | None, overwrite: bool
) -> list[StageReport]:
    """Let models answer the held-out prompts, and score and judge what they say.

    Args:
        run: The run folder.
        group: Where the tables go: evaluation or ablations.
        models: Folder or Hub name of each, by its name in the tables.
        timed: Dialogues that are answered one at a time, for response times; None: all of them.
        overwrite: Make the tables even if nothing changed.
    """
    return [
        _answer(run, f"{group}/responses", models, timed, overwrite),
        _score(run, group, overwrite),
        judge_held_out(run, group, overwrite),
    ]


def _answer(
    run: RunFolder, table: str, models: Mapping[str, str | Path], timed: int | None, overwrite: bool
) -> StageReport:
    """Let models answer what is not stored yet."""
    profile = run.profile
    dialogues = run.read("dialogues").query("split == 'valid'")
    if dialogues.empty:
        raise PersodpoError("There are no held-out dialogues to answer; give the profile a valid split.")
    run.asked |= models.keys()
    run.files |= {path for weights in models.values() for path in weights_of(weights)}
    with Store(run.answers) as store:
        jobs = [job for job, _ in _jobs(run, dialogues, models, timed)]
        check_finished(generate_all(jobs, store, reading=profile.reading), run, "evaluate")
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
        for size, part in ((1, dialogues.iloc[:first]), (BATCH_SIZE, dialogues.iloc[first:])):
            if len(part):
                entry = TransformersModel(model=model, weights=str(weights), batch_size=size)
                yield job_for(part, entry, run.profile, weights), part["split"].tolist()


def judge_held_out(run: RunFolder, group: str, overwrite: bool = False) -> StageReport:
    """Judge held-out responses by what no pair set was made from: references, and the generated world where there is one."""
    generated, answers, table = run.profile.dialogues.source == "miniature", f"{group}/responses", f"{group}/judged"

    def build() -> Tables:
        responses, dialogues = run.read(answers), run.read("dialogues")
        overlap = extras_table(responses, dialogues)["rouge_l"].where(responses["outcome"] == "ok", 0.0)
        repeats = [repeats_sentence(text or "") for text in responses["response"]]
        frame = responses[["dialogue_id", "model"]].assign(rouge_l=overlap, repeats=repeats)
        if generated:
            frame = frame.merge(judge(dialogues, responses), on=["dialogue_id", "model"], validate="one_to_one")
        return {table: frame.reindex(columns=SCHEMAS[table].names)}

    return run.stage(
        f"judge {answers}", build, reads=["dialogues", answers], settings={"generated": generated}, outputs=[table],
        overwrite=overwrite,
    )  # fmt: skip


def _score(run: RunFolder, group: str, overwrite: bool) -> StageReport:
    """Score held-out responses on the scale of the ranked ones, with the same scorers."""
    profile, answers, table = run.profile, f"{group}/responses", f"{group}/scores"
    scorers = score.run_scorers(run)

    def build() -> Tables:
        responses = run.read(answers)
        metrics, _, _ = score.measure(run, responses, scorers)
        values = pairs.impute(responses, metrics, unread=True, count=pairs.word_counter(profile))
        return {table: pairs.rate(values, pairs.scale_of(run.read("scores"), profile.scoring), profile)}

    return run.stage(
        f"score {answers}", build, reads=["dialogues", "scores", answers], outputs=[table], overwrite=overwrite,
        settings=score.score_settings(profile, scorers),
    )  # fmt: skip
