"""Dialogues and one model's settings in, its requests and backend out; and what the store holds of them, as a table."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from persodpo.completions import read_completion
from persodpo.config import AskedModel, Profile, ServedModel, TransformersModel
from persodpo.errors import PersodpoError
from persodpo.generation.engine import Job
from persodpo.generation.requests import Backend, Message, Request, request_key
from persodpo.generation.store import Store
from persodpo.generation.summary import outcome_of
from persodpo.prompts import answer_keys, load_system, load_template, render, template_digest, token_budget
from persodpo.tables import schema_of, with_none

#: What leads a turn; a context of nothing else says nothing.
_SPEAKER = re.compile(r"^\w+:", re.MULTILINE)


def job_for(dialogues: pd.DataFrame, settings: AskedModel, profile: Profile, backend: Backend) -> Job:
    """Return what one model is to answer.

    Args:
        dialogues: Rows of the dialogues table.
        settings: How the model is asked.
        profile: Template, word limit, token budget and sampling.
        backend: From `backend_for`.

    Returns:
        A job whose requests are rendered as they are taken.

    Raises:
        PersodpoError: A template is wrong, or a dialogue has no context.
    """
    template = load_template(profile.prompts.template)
    system = load_system(profile.prompts.system, profile.prompts) if settings.format == "chat_with_system" else None
    said = dialogues["context"].fillna("").str.replace(_SPEAKER, "", regex=True).str.strip()
    empty = dialogues.loc[said == "", "dialogue_id"]
    if len(empty):
        raise PersodpoError(
            f"Dialogue '{empty.iloc[0]}' has no context to answer ({len(empty)} such dialogues); leave it out of its file."
        )
    generation, digest = profile.generation, template_digest(template, system)
    budget = token_budget(template, profile.prompts.max_words, fits_words=profile.corrects("A5"))
    seed = profile.seed if generation.temperature else None

    def requests() -> Iterator[Request]:
        rows = zip(dialogues["dialogue_id"], dialogues["personas"], dialogues["context"], strict=True)
        for dialogue_id, personas, context in rows:
            text = render(template, personas, context, profile.prompts, persona_lines=profile.corrects("A10a"))
            prompt = text if settings.format == "raw" else as_messages(text, system)
            yield Request(dialogue_id, prompt, budget, generation.temperature, seed, digest)

    return Job(requests(), backend, total=len(dialogues))


def as_messages(prompt: str, system: str | None) -> tuple[Message, ...]:
    """Return a prompt as a chat of one user message, after the system message if there is one."""
    first = (Message(role="system", content=system),) if system else ()
    return (*first, Message(role="user", content=prompt))


def backend_for(settings: AskedModel, profile: Profile, weights: str | Path, store: Store) -> Backend:
    """Return the backend that a model is asked through.

    Args:
        settings: How the model is asked.
        profile: The template, whose keys structured output asks for.
        weights: Folder or Hub name of a model of this machine.
        store: Where batches under way are kept in mind.

    Returns:
        The backend; nothing is connected or loaded yet.
    """
    if isinstance(settings, TransformersModel):
        from persodpo.generation.local import TransformersBackend  # noqa: PLC0415 - each backend loads only what it needs

        return TransformersBackend(settings, weights)
    if isinstance(settings, ServedModel):
        from persodpo.generation.serving import ServedBackend  # noqa: PLC0415

        return ServedBackend(settings, weights)
    from persodpo.generation.batch_api import OpenAIBatchBackend  # noqa: PLC0415
    from persodpo.generation.openai_api import OpenAIBackend  # noqa: PLC0415

    keys = answer_keys(load_template(profile.prompts.template)) if settings.structured_output else ()
    return OpenAIBatchBackend(settings, keys, store) if settings.batch else OpenAIBackend(settings, keys)


def stored_answers(store: Store, jobs: Iterable[tuple[Job, Sequence[str]]], profile: Profile) -> pd.DataFrame:
    """Return what the store holds of some jobs.

    Args:
        store: The store.
        jobs: Each with the splits of its dialogues; its requests are gone through.
        profile: How completions are read.

    Returns:
        An answers table (`persodpo.tables.SCHEMAS`), a row for each request that was answered or has failed.
    """
    rows = []
    for job, splits in jobs:
        requests = list(zip(job.requests, splits, strict=True))
        keys = [request_key(request, job.backend) for request, _ in requests]
        for (request, split), (_, entry) in zip(requests, store.entries(keys), strict=True):
            if entry is None:
                continue
            answer = asdict(entry.answer)
            reading = profile.reading
            rows.append({
                **answer, "dialogue_id": request.dialogue_id, "split": split, "model": job.backend.model,
                "response": read_completion(entry.answer.completion, reading).response,
                "outcome": outcome_of(entry.answer, reading), "response_time": entry.answer.latency,
                "created": entry.created,
            })  # fmt: skip
    frame = pd.DataFrame(rows, columns=schema_of("answers").names)
    whole = {
        name: frame[name].astype("Int64") for name in ("batch_size", "prompt_tokens", "completion_tokens", "attempts")
    }
    return with_none(frame.assign(**whole))
