"""A profile in, what this machine lacks for it out; no model is loaded, and nothing is sent, fetched or left behind."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from persodpo.config import ENCODER, HUB_ENCODER, OpenAIModel, Profile, is_csv, with_overrides
from persodpo.errors import PersodpoError
from persodpo.files import PROJECT, name_and_revision, place_of
from persodpo.generation.client import api_key
from persodpo.release.fetch import release_files
from persodpo.run import Run
from persodpo.runfolder import RunFolder, StageReport
from persodpo.scoring.models import FILES, device_name, encoder_folder
from persodpo.stages.generate import Scope, forecast_report
from persodpo.stages.policy import PREFIX, miniature_folder, model_folder


class Finding(NamedTuple):
    """State ``ok``, ``missing`` (a run would stop or download) or ``note``; the sentence holds a remedy and no secret."""

    state: str
    sentence: str


def diagnose(profile: Profile) -> Iterator[Finding]:
    """Yield findings on files, what asking would take, keys, models, packages, the GPU and disks, in this order."""
    try:
        yield from _files(profile)
    except PersodpoError as error:
        yield Finding("missing", str(error))
    ranked_models = profile.generation.models if profile.generation.source == "models" else ()
    models = [("the policy", profile.policy.model)]
    for entry in profile.generation.backends:
        if entry.model in ranked_models and isinstance(entry, OpenAIModel):
            yield _key(entry, profile.generation.budget_usd is not None)
        elif entry.model in ranked_models and not isinstance(entry, OpenAIModel):
            models.append((entry.model, entry.weights))
            models += [(f"{entry.model}'s adapter", str(entry.adapter))] if entry.adapter else []
    if profile.scoring.source == "compute":
        scorers = profile.scoring.models.model_dump()
        models += [(scorer, name) for scorer, name in scorers.items() if name != ENCODER]
        models += [("the sentence encoder", profile.scoring.encoder)] if ENCODER in scorers.values() else []
    for use, name in models:
        if name not in {"small", "policy"} and not name.startswith(PREFIX):  # those are made by the run
            yield _model(use, name)
    if profile.scoring.source == "compute" and profile.scoring.ray_workers:
        yield Finding("ok" if find_spec("ray") else "missing", "Package ray: pip install 'persodpo[ray]'")
    yield from _machine(profile)


def _files(profile: Profile) -> Iterator[Finding]:
    """Run the stages that read files in a scratch folder that sees the run's stored answers and its models."""
    run, source = RunFolder(profile), profile.generation.source
    if "published" in {profile.dialogues.source, source, profile.scoring.source, profile.evaluation.source}:
        count = len(release_files(run.release))
        yield Finding("ok", f"Files: all {count} published ones are in {run.release}.")
    with TemporaryDirectory(prefix="persodpo-doctor-") as scratch:
        copy = Run(with_overrides(profile, [f"home={scratch}"]))
        copy.root.mkdir(parents=True)
        copy.release.parent.mkdir()
        for path in filter(Path.exists, (run.release, run.answers, model_folder(run, "small"), miniature_folder(run))):
            (Path(scratch) / path.relative_to(PROJECT / profile.home)).symlink_to(path)
        for report in copy.make("generate" if is_csv(source) else "dialogues"):
            if isinstance(report, StageReport):
                yield Finding("ok", "Files: " + ", ".join(f"{rows:,} {table}" for table, rows in report.rows.items()))
        if source == "models":
            lines = forecast_report(copy, Scope(profile.generation.models, ("train",)))
            yield from (Finding("note", f"Asking {line}") for line in lines)


def _key(entry: OpenAIModel, has_budget: bool) -> Finding:
    try:
        key = f"{entry.api_key_env} is set" if api_key(entry) else "none is needed"
    except PersodpoError as error:
        return Finding("missing", str(error))
    if has_budget and entry.prices is None:
        return Finding("missing", f"Model {entry.model} has no prices, which the budget needs; set them or no budget.")
    return Finding("ok", f"Key of {entry.model}: {key}; `persodpo generate --limit 1 -m {entry.model}` tries it.")


def _model(use: str, name: str) -> Finding:
    """Look for the fetched encoder, a file of word vectors, or weights in a folder or in the Hub's cache."""
    if name == HUB_ENCODER:
        there = all((encoder_folder() / file).is_file() for file in FILES)
        return Finding("ok" if there else "missing", f"Model of {use}: {name}; `persodpo fetch encoder` fetches it.")
    place = Path(place_of(name))
    with suppress(HFValidationError, LocalEntryNotFoundError, PersodpoError):
        model, revision = name_and_revision(str(place))
        place = place if place.exists() else Path(snapshot_download(model, revision=revision, local_files_only=True))
    if (use == "persona_distance" and place.is_file()) or any(place.glob("*.safetensors")):
        return Finding("ok", f"Model of {use}: {name} is on this machine.")
    return Finding(
        "missing",
        f"Model of {use}: {name} is not here or not in safetensors; put it there, or `hf download` it.",
    )


def _machine(profile: Profile) -> Iterator[Finding]:
    if device_name() == "cuda":
        import torch  # noqa: PLC0415 - slow to load

        gpu = torch.cuda.get_device_properties(0)
        yield Finding("ok", f"GPU: {gpu.name} with {gpu.total_memory / 2**30:,.0f} GiB.")
    else:
        yield Finding("note", "GPU: there is none; a CPU takes long with models of more than some million parameters.")
    for place in (RunFolder(profile).root, Path(constants.HF_HUB_CACHE)):
        there = next(folder for folder in (place.absolute(), *place.absolute().parents) if folder.exists())
        free = shutil.disk_usage(there).free / 2**30
        state = "note" if free >= 1 else "missing"
        yield Finding(state, f"Disk: {free:,.1f} GiB are free for {place}; mini takes 1, paper 100 and more.")
