"""The stages in the order in which text flows, and the one loop that runs them.

A stage reads the tables of earlier ones and makes its own, unless they are there and nothing that they follow from has
changed (`persodpo.runfolder.RunFolder.stage`). No stage calls another: the loop does first what a stage needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from persodpo.config import Profile
from persodpo.errors import PersodpoError
from persodpo.runfolder import RunFolder, StageReport
from persodpo.stages import (
    ablate,
    audit,
    cards,
    dialogues,
    evaluate,
    figures,
    generate,
    pairs,
    records,
    score,
    train,
)
from persodpo.stages.base import Need, Stage, published_at_hand

__all__ = ["STAGES", "make", "plan", "published_at_hand"]

#: Every stage by name, in order.
STAGES: Mapping[str, Stage] = {
    "dialogues": Stage(dialogues.make_dialogues),
    "generate": Stage(generate.make_responses, generate.needs, shared=True),
    "ask": Stage(generate.ask, generate.needs_to_ask, shared=True),
    "score": Stage(score.make_scores, ["generate"]),
    "pairs": Stage(pairs.make_pairs, ["score"], after=cards.after_pairs),
    "train": Stage(train.train_arms, train.needs, after=cards.after_training),
    "evaluate": Stage(evaluate.evaluate, evaluate.needs, after=cards.after_evaluation),
    "ablate": Stage(ablate.ablate, ablate.needs),
    "audit": Stage(audit.judge, ["pairs"], profile=audit.as_released),
    "figures": Stage(figures.draw, ["train", "evaluate", "ablate"]),
}

Step = tuple[Profile, str, Mapping[str, Any]]


def plan(profile: Profile, name: str, options: Mapping[str, Any] | None = None) -> list[Step]:
    """Return the profile, name and options of a stage and of all that it needs, in the order in which they run.

    Raises:
        PersodpoError: There is no such stage, or the profile cannot be run; nothing is written.
    """
    if name not in STAGES:
        raise PersodpoError(f"There is no stage '{name}'; there are {', '.join(STAGES)}.")
    stage, options = STAGES[name], options or {}
    profile = stage.profile(profile) if stage.profile else profile
    steps: list[Step] = []
    for need in stage.needs(profile, **options) if callable(stage.needs) else map(Need, stage.needs):
        steps += [step for step in plan(need.profile or profile, need.stage, need.options) if step not in steps]
    return [*steps, (profile, name, options)]


def make(profile: Profile, name: str, overwrite: bool = False, **options: Any) -> list[object]:
    """Run a stage, and before it those that it needs where something has changed.

    Args:
        profile: The profile.
        name: One of `STAGES`.
        overwrite: Run the stage even if nothing changed; those before it run only where something has.
        **options: Those of the stage.

    Returns:
        Reports of what was done, in order; each reads as a line.

    Raises:
        PersodpoError: The profile cannot be run, a stage fails, or another process works in the run folder.
    """
    reports: list[object] = []
    steps = plan(profile, name, options)
    wait = generate.WAIT_SECONDS if name == "dialogues" or STAGES[name].shared else 0.0
    with ExitStack() as held:
        for step in steps:
            run, stage = RunFolder(step[0]), STAGES[step[1]]
            anew = overwrite and step is steps[-1]
            done: Sequence[object] | None = None if anew else records.unchanged(run, step[1], stage, step[2])
            if done is None:
                if stage.shared:
                    held.close()
                else:
                    held.enter_context(run.locked(wait))
                done = _run(run, stage, anew, step[2])
                records.remember(run, step[1], stage, step[2], done)
            else:
                run.write_settings()
            if run.profile.name != steps[-1][0].name:  # of another run, that arm ``corrected`` needs
                done = [
                    replace(one, stage=f"{run.profile.name}, {one.stage}") if isinstance(one, StageReport) else one
                    for one in done
                ]
            reports += done
    return reports


def _run(run: RunFolder, stage: Stage, overwrite: bool, options: Mapping[str, Any]) -> list[object]:
    reports = [*stage.run(run, overwrite=overwrite, **options)]
    notes = tuple(stage.after(run, **options)) if stage.after else ()
    if notes and isinstance(last := reports[-1], StageReport):
        reports[-1] = replace(last, notes=(*last.notes, *notes))
    return reports


def nothing_to_do(profile: Profile) -> bool:
    """Tell whether no stage of a profile would do anything; the audit is left out where nothing published is at hand."""
    names = ["figures", *(["audit"] if published_at_hand(RunFolder(profile)) else [])]
    try:
        steps = [step for name in names for step in plan(profile, name)]
    except PersodpoError:  # there is a stage that this profile has not
        return False
    return all(
        records.unchanged(RunFolder(one), name, STAGES[name], options) is not None for one, name, options in steps
    )
