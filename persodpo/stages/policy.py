"""The model that arms start from, and that `weights: policy` of a backend names."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import persodpo.pairs
from persodpo.completions import write_completion
from persodpo.files import place_of
from persodpo.miniature.models import BASE, STEPS, lessons
from persodpo.runfolder import RunFolder

#: What names of miniature models start with, wherever weights are named.
PREFIX = "miniature/"


def start_policy(run: RunFolder) -> str | Path:
    """Return the policy of a run's profile; the small one is made from the run's own texts if need be."""
    return made_model(run, run.profile.policy.model)


def made_model(run: RunFolder, name: str) -> str | Path:
    """Return a model by its name; ``small`` and ``miniature/<name>`` are made if need be, the middling one first."""
    from persodpo.training.policy import SmallPolicy, make_small_policy

    profile = run.profile
    size = SmallPolicy(**profile.policy.small.model_dump(), max_length=profile.training.max_length, seed=profile.seed)
    if name == "small":
        prompts = persodpo.pairs.prompt_table(run.read("dialogues"), profile)
        parsed = run.read("responses").query("outcome == 'ok'").merge(prompts, on="dialogue_id")
        texts = [write_completion(text) for text in parsed["response"]]
        return make_small_policy(list(zip(parsed["prompt"], texts, strict=True)), size, model_folder(run, name))
    if not name.startswith(PREFIX):
        return place_of(name)
    folder, name = miniature_folder(run), name.removeprefix(PREFIX)
    learn = partial(lessons, folder=folder, prompts=profile.prompts, seed=profile.seed)
    examples = learn(name)  # an unknown name is refused before anything is made
    base = make_small_policy(learn(BASE), size, folder / BASE)
    if name == BASE:
        return base
    steps, share = STEPS[name]
    finish = size.model_copy(update={"steps": steps, "learning_rate": size.learning_rate * share})
    return make_small_policy(examples, finish, folder / name, start=base)


def model_folder(run: RunFolder, name: str) -> Path:
    """Return where the model called ``small`` or ``miniature/<name>`` lies, whether it is there or not."""
    return miniature_folder(run) / name.removeprefix(PREFIX) if name.startswith(PREFIX) else run.root / "policy"


def miniature_folder(run: RunFolder) -> Path:
    """Return where the miniature models of a world lie: beside its runs, which share them; no run can be called so."""
    return run.root.with_name(f"_miniature-{run.profile.seed}")
