"""Which prompts of a run are asked of which models, and through what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from persodpo.config import AskedModel, Profile, ServedModel, TransformersModel
from persodpo.errors import PersodpoError
from persodpo.generation.requests import Backend, Job, requests_for
from persodpo.prompts import answer_keys, load_template
from persodpo.runfolder import PROJECT, RunFolder
from persodpo.stages import policy

SPLITS = ("train", "valid")
#: How long the tables of answers, and small models, wait for another process that works in the run folder.
WAIT_SECONDS = 60.0


@dataclass(frozen=True)
class Scope:
    """Which prompts of a run are meant.

    Attributes:
        models: Names of backends.
        splits: Of the dialogues.
        limit: Dialogues of each split, from the first on; None for all.
    """

    models: tuple[str, ...]
    splits: tuple[str, ...] = SPLITS
    limit: int | None = None


def asked_scope(profile: Profile, models: Sequence[str], splits: Sequence[str], limit: int | None) -> Scope:
    """Return a scope of known models and splits; without models, those of the profile.

    Raises:
        PersodpoError: A model has no entry in ``generation.backends``, or none is named and the profile reads published
            responses; a split is unknown.
    """
    unknown = [split for split in splits if split not in SPLITS]
    if unknown:
        raise PersodpoError(f"There is no split '{unknown[0]}'; name {' or '.join(SPLITS)}.")
    if not models and profile.generation.source != "models":
        names = ", ".join(entry.model for entry in profile.generation.backends)
        raise PersodpoError(
            f"This profile asks no model, its responses are read; name the models to ask with --models ({names})."
        )
    for model in models:
        entry_of(profile, model)
    return Scope(tuple(dict.fromkeys(models)) or profile.generation.models, tuple(splits) or SPLITS, limit)


def entry_of(profile: Profile, model: str) -> AskedModel:
    """Return how a model is asked."""
    known = {entry.model: entry for entry in profile.generation.backends}
    if model not in known:
        names = ", ".join(known) or "none"
        raise PersodpoError(f"Model '{model}' has no entry in generation.backends; there are: {names}.")
    return known[model]


def is_small_policy(entry: AskedModel, profile: Profile) -> bool:
    """Tell whether a model is the small policy, which is made from a run's responses; an error where these are its own."""
    names_policy = isinstance(entry, (TransformersModel, ServedModel)) and entry.weights == "policy"
    is_policy = names_policy and profile.policy.model == "small"
    if is_policy and profile.generation.source == "models":
        raise PersodpoError(
            f"Model {entry.model} is the small policy, which is made from responses that are there already; with "
            "generation.source=models name other weights for it."
        )
    return is_policy


def jobs_of(run: RunFolder, scope: Scope, *, make_policy: bool) -> list[tuple[Job, list[str]]]:
    """Return what each model of the scope is to answer, with the splits of its dialogues."""
    table = run.read("dialogues")
    parts = [part if scope.limit is None else part.head(scope.limit)
             for part in (table[table["split"] == split] for split in scope.splits)]  # fmt: skip
    dialogues = pd.concat(parts)
    jobs = []
    for model in scope.models:
        entry = entry_of(run.profile, model)
        weights = _weights(run, entry, make_policy=make_policy)
        jobs.append((job_for(dialogues, entry, run.profile, weights), dialogues["split"].tolist()))
    return jobs


def job_for(dialogues: pd.DataFrame, entry: AskedModel, profile: Profile, weights: str | Path) -> Job:
    """Return what one model is to answer; nothing is connected or loaded yet.

    Args:
        dialogues: Rows of the dialogues table.
        entry: How the model is asked.
        profile: Template, word limit, token budget and sampling.
        weights: Folder or Hub name of a model of this machine.

    Raises:
        PersodpoError: A template is wrong, or a dialogue has no context.
    """
    return Job(requests_for(dialogues, entry, profile), _backend(entry, profile, weights), len(dialogues))


def _backend(entry: AskedModel, profile: Profile, weights: str | Path) -> Backend:
    """Return the backend that a model is asked through; each loads only what it needs."""
    if isinstance(entry, TransformersModel):
        from persodpo.generation.local import TransformersBackend
        from persodpo.training.policy import load_policy

        return TransformersBackend(entry, weights, load_policy)
    if isinstance(entry, ServedModel):
        from persodpo.generation.serving import ServedBackend

        return ServedBackend(entry, weights)
    from persodpo.generation.batch import BatchBackend
    from persodpo.generation.endpoint import OpenAIBackend

    keys = answer_keys(load_template(profile.prompts.template)) if entry.structured_output else ()
    return (BatchBackend if entry.batch else OpenAIBackend)(entry, keys)


def _weights(run: RunFolder, entry: AskedModel, *, make_policy: bool) -> str | Path:
    """Return the weights of a model of this machine, as a folder or a name on the Hub."""
    if not isinstance(entry, (TransformersModel, ServedModel)):
        return ""
    name = entry.weights
    small = is_small_policy(entry, run.profile)
    if name == "policy" and not small:
        name = run.profile.policy.model
    miniature = name.startswith(policy.PREFIX)
    if (small or miniature) and make_policy:
        with run.locked(WAIT_SECONDS):
            return policy.miniature_model(run, name) if miniature else policy.start_policy(run)
    if miniature:
        return policy.miniature_folder(run) / name.removeprefix(policy.PREFIX)
    if small:
        return policy.policy_folder(run)
    folder = PROJECT / name
    return folder if folder.is_dir() else name
