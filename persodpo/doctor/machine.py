"""What a profile asks of the machine: keys, packages, a GPU and its memory, free disk."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants

from persodpo.artifacts import PROJECT
from persodpo.doctor.files import asked
from persodpo.doctor.findings import GIB, Finding, gib, missing, ok, unknown
from persodpo.doctor.sizes import Memory, Sizes
from persodpo.doctor.weights import models
from persodpo.errors import PersodpoError
from persodpo.generation.endpoint import api_key, check_address
from persodpo.scoring.checkpoints import device_name
from persodpo.scoring.word_vectors import MAP_FROM
from persodpo.settings import OpenAIModel, Profile, ServedModel

#: Tables, figures and small models of a run.
SMALL_RUN = GIB
#: A gzip file of word vectors holds about so many times its size.
UNPACKED = 2.5


def gpu_memory() -> tuple[str, int] | None:
    """Return name and bytes of the first GPU, None if none can be used."""
    if device_name() == "cpu":
        return None
    import torch  # noqa: PLC0415 - slow to load, and only where there may be a GPU

    found = torch.cuda.get_device_properties(0)
    return str(found.name), int(found.total_memory)


def keys(profile: Profile) -> Iterator[Finding]:
    """Yield a finding for each endpoint's address, key and prices; a key's variable is named, never its value."""
    endpoints = [entry for entry in asked(profile) if isinstance(entry, OpenAIModel)]
    by_variable: dict[str, OpenAIModel] = {}
    for entry in endpoints:
        by_variable.setdefault(entry.api_key_env or "", entry)
        try:
            check_address(entry)
        except PersodpoError as error:
            yield missing(f"Endpoint: {error}")
        if profile.generation.budget_usd is not None and entry.prices is None:
            yield missing(
                f"Prices of {entry.model}: a budget is set, which cannot be kept without them; set its prices, or no budget."
            )
    for variable, entry in by_variable.items():
        if variable:
            try:
                api_key(entry)
                yield ok(f"API key: the environment variable {variable} is set; whether it is valid is not asked.")
            except PersodpoError as error:
                yield missing(f"API key: {error}")
    if endpoints:
        names = ", ".join(entry.model for entry in endpoints)
        yield unknown(
            f"Endpoints of {names}: nothing is sent here; try each with `persodpo generate --limit 1 -m NAME`."
        )


def packages(profile: Profile) -> Iterator[Finding]:
    """Yield a finding for each optional package that the profile uses."""
    wanted: list[tuple[str, str, str]] = []
    if profile.scoring.source == "compute":
        if profile.engine.scorers == "ray":
            wanted.append(("ray", "persodpo[ray]", "engine.scorers: ray"))
        scorers = [model for model in models(profile) if model.kind == "scorer"]
        if any(model.use == "persona_distance" and model.can_be_fetched for model in scorers):
            wanted.append(("sentence_transformers", "persodpo[sentences]", "persona distance by sentence vectors"))
    if any(isinstance(entry, ServedModel) for entry in asked(profile)):
        wanted += [(name, name, "models of kind served") for name in ("fastapi", "uvicorn")]
    for module, install, use in wanted:
        if importlib.util.find_spec(module):
            yield ok(f"Package {module} ({use}): it is installed.")
        else:
            yield missing(f"Package {module} ({use}): it is not installed; get it with `pip install '{install}'`.")


def gpu(profile: Profile, sizes: Sizes) -> Finding:
    """Return whether there is a GPU that holds what the profile runs, as far as one is needed."""
    found = gpu_memory()
    wanted = sizes.memory(profile)
    return _no_gpu(profile, wanted) if found is None else _fits(*found, wanted)


def _no_gpu(profile: Profile, wanted: Memory) -> Finding:
    if profile.training.bf16:
        return missing(
            "GPU: none can be used here, and training.bf16 wants one; run on a machine with one "
            f"({wanted.sentence}), or set training.bf16=false and a smaller policy.model."
        )
    if all(model.is_made for model in models(profile)):
        return ok("GPU: none can be used here, and none is needed for small models.")
    return unknown(
        f"GPU: none can be used here; a CPU does the same and may take days ({wanted.sentence}); "
        "on a machine with a GPU it is used without being asked for."
    )


def _fits(name: str, size: int, wanted: Memory) -> Finding:
    what = f"GPU: {name} with {gib(size)}; {wanted.sentence}"
    if wanted.low is None or wanted.high is None:
        return unknown(f"{what}; look again when the weights are here.")
    if size < wanted.low:
        return missing(
            f"{what}, which does not fit; take a larger GPU, or set training.lora_rank or a smaller policy.model or weights."
        )
    if size < wanted.high:
        return unknown(
            f"{what}, which may not fit; if it does not, lower training.token_budget or set "
            "training.gradient_checkpointing=true."
        )
    return ok(f"{what}, which fits.")


def disk(profile: Profile, sizes: Sizes) -> Iterator[Finding]:
    """Yield whether the disks have room for the run, the downloads and the mapped word vectors."""
    runs = PROJECT / profile.paths.runs
    trained = sizes.trained(profile)
    if trained is None:
        yield unknown(
            f"Disk of {runs}: {gib(_free(runs))} are free; what trained arms take is unknown until the policy's config.json "
            "is on this machine."
        )
    else:
        yield _room(f"Disk of {runs}", runs, trained + SMALL_RUN, "paths.runs", "the run and its trained arms")
    coming = [size for model in models(profile) if (size := model.bytes_to_come()) != 0 and model.can_be_fetched]
    cache = Path(huggingface_hub.constants.HF_HUB_CACHE)
    if None in coming:
        yield unknown(
            f"Disk of the Hub's cache ({cache}): {gib(_free(cache))} are free; how much is to be downloaded cannot be told "
            "without the network."
        )
    elif coming:
        yield _room("Disk of the Hub's cache", cache, sum(filter(None, coming)), "HF_HOME", "what is to be downloaded")
    vectors = Path(profile.scoring.compute.models.persona_distance)
    is_large = profile.scoring.source == "compute" and vectors.is_file() and vectors.stat().st_size >= MAP_FROM
    if is_large and not vectors.with_name(f"{vectors.name}.mapped").is_dir():
        mapped = vectors.stat().st_size * (UNPACKED if vectors.suffix == ".gz" else 1)
        yield _room("Disk of the word vectors", vectors.parent, mapped, "the file", "the mapped matrix beside the file")


def _room(what: str, place: Path, wanted: float, move: str, use: str) -> Finding:
    free = _free(place)
    if free < wanted:
        return missing(
            f"{what}: {gib(free)} are free, {use} may take {gib(wanted)}; free some, or move {move} to a larger disk."
        )
    return ok(f"{what}: {gib(free)} are free, {use} may take {gib(wanted)}.")


def _free(place: Path) -> int:
    """Return the free bytes of the disk that ``place`` is or will be on."""
    there = next(folder for folder in (place.absolute(), *place.absolute().parents) if folder.exists())
    return shutil.disk_usage(there).free
