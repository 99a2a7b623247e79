"""The model that arms start from, and that `weights: policy` of a backend names."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import persodpo.pairs
from persodpo.completions import write_completion
from persodpo.config import Profile
from persodpo.miniature.models import BASE, STEPS, lessons
from persodpo.runfolder import RunFolder

if TYPE_CHECKING:
    from persodpo.training.policy import SmallPolicy

#: What names of miniature models start with, wherever weights are named.
PREFIX = "miniature/"


def start_policy(run: RunFolder) -> str | Path:
    """Return the policy of a run's profile; the small one is made from the run's own texts if need be."""
    from persodpo.training.policy import make_small_policy

    name = run.profile.policy.model
    if name.startswith(PREFIX):
        return miniature_model(run, name)
    if name != "small":
        return name
    prompts = persodpo.pairs.prompt_table(run.read("dialogues"), run.profile)
    responses = run.read("responses")
    parsed = responses[responses["outcome"].eq("ok")].merge(prompts, on="dialogue_id")
    texts = [write_completion(text) for text in parsed["response"]]
    examples = list(zip(parsed["prompt"], texts, strict=True))
    return make_small_policy(examples, small_policy(run.profile), policy_folder(run))


def small_policy(profile: Profile) -> SmallPolicy:
    """Return size and warm-up of the small policy and of the miniature models."""
    from persodpo.training.policy import SmallPolicy

    return SmallPolicy(**profile.policy.small.model_dump(), max_length=profile.training.max_length, seed=profile.seed)


def miniature_model(run: RunFolder, name: str) -> Path:
    """Return the folder of a model called ``miniature/<name>``; it is made if need be, and the middling one before it."""
    from persodpo.training.policy import make_small_policy

    profile, size, folder = run.profile, small_policy(run.profile), miniature_folder(run)
    learn = partial(lessons, folder=folder, miniature=profile.miniature, prompts=profile.prompts, seed=profile.seed)
    name = name.removeprefix(PREFIX)
    examples = learn(name)  # an unknown name is refused before anything is made
    base = make_small_policy(learn(BASE), size, folder / BASE)
    if name == BASE:
        return base
    steps, share = STEPS[name]
    finish = size.model_copy(update={"steps": steps, "learning_rate": size.learning_rate * share})
    return make_small_policy(examples, finish, folder / name, start=base)


def miniature_folder(run: RunFolder) -> Path:
    """Return where the miniature models of a world lie: beside its runs, which share them; no run can be called so."""
    return run.root.with_name(f"_miniature-{run.profile.seed}")


def policy_folder(run: RunFolder) -> Path:
    """Return where the small policy of a run lies, whether it is there or not."""
    return run.root / "policy"
