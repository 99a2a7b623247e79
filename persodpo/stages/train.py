"""From pairs to trained policies."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd

from persodpo.config import ArmName, Profile, Training, with_overrides
from persodpo.corrections import WITHOUT_ASKING
from persodpo.errors import PersodpoError
from persodpo.files import digest_of, sha256
from persodpo.runfolder import RunFolder, StageReport, Tables
from persodpo.stages.base import Need
from persodpo.stages.policy import PREFIX, start_policy
from persodpo.training.arms import ARMS, arm_name, label_of

#: Seconds that a starting policy may take to be made without being mentioned.
WORTH_SAYING = 5


def needs(profile: Profile, arms: Sequence[str] = (), **_: object) -> list[Need]:
    """Return the pairs that arms train on, those of the profile unless others are named."""
    required = [Need("pairs")]
    for arm in [arm_name(arm) for arm in arms or profile.training.arms]:
        if ARMS[arm].pairs not in profile.pairs.sets:
            raise PersodpoError(f"Arm {arm} trains on {ARMS[arm].pairs} pairs; add {ARMS[arm].pairs} to pairs.sets.")
        if ARMS[arm].corrected:
            required.append(Need("pairs", corrected(profile)))
    return required


def corrected(profile: Profile) -> Profile:
    """Return the profile of arm ``corrected``, whose pairs lie in a run folder of their own."""
    mended = profile.with_corrections(*WITHOUT_ASKING)
    return with_overrides(mended, [f"name={profile.name}-corrected"])


def train_arms(
    run: RunFolder, overwrite: bool = False, *, arms: Sequence[str] = (), seeds: Sequence[int] = ()
) -> list[StageReport]:
    """Train arms from the same policy, each once under each seed; those of `trained`."""
    return [_train(run, source_of(run, arm), arm, seed, overwrite) for arm, seed in trained(run.profile, arms, seeds)]


def trained(profile: Profile, arms: Sequence[str] = (), seeds: Sequence[int] = ()) -> list[tuple[ArmName, int]]:
    """Return each arm with each seed: the profile's arms and the first of ``evaluation.seeds`` unless others are given."""
    arm_names = [arm_name(arm) for arm in arms or profile.training.arms]
    return [(arm, seed) for arm in arm_names for seed in seeds or profile.evaluation.seeds[:1]]


def source_of(run: RunFolder, arm: ArmName) -> RunFolder:
    """Return the run folder whose pairs an arm trains on."""
    return RunFolder(corrected(run.profile)) if ARMS[arm].corrected else run


def arm_folder(run: RunFolder, label: str) -> Path:
    """Return where an arm of this label lies."""
    return run.path(f"training/{label}/log").parent


def _train(run: RunFolder, source: RunFolder, arm: ArmName, seed: int, overwrite: bool) -> StageReport:
    table = f"pairs/{ARMS[arm].pairs}"
    label = label_of(arm, seed, run.profile.evaluation.seeds)
    seeded = run.profile.model_copy(update={"seed": seed})
    files = {table: source.path(table)}
    return train_on(run, arm, label, lambda: source.read(table), files=files, profile=seeded, overwrite=overwrite)


def train_on(
    run: RunFolder,
    arm: ArmName,
    label: str,
    pairs: Callable[[], pd.DataFrame],
    *,
    files: Mapping[str, Path],
    profile: Profile,
    overwrite: bool = False,
    basis: Mapping[str, object] | None = None,
) -> StageReport:
    """Train the run's starting policy as an arm is trained, unless that was done.

    Args:
        run: Where ``training/<label>/`` goes.
        arm: The arm, which says how pairs are weighed.
        label: Name of the folder.
        pairs: Gives the pairs table.
        files: Those that the pairs follow from.
        profile: Its training section, reading of completions and seed are used.
        overwrite: Train even if nothing changed.
        basis: Other settings that the pairs follow from.
    """
    from persodpo.training import run as training

    started = time.perf_counter()
    start = start_policy(run)
    waited = time.perf_counter() - started
    outputs = [f"training/{label}/{name}" for name in ("log", "health", "generations")]
    files = dict(files) | {f"policy/{path.name}": path for path in weights_of(start)}
    settings = {
        "arm": asdict(ARMS[arm]),
        "policy": profile.policy.model,
        "training": profile.training.model_dump(mode="json", exclude={"arms", "report_to"}),
        "reading": profile.reading,
        "seed": profile.seed,
        **(basis or {}),
    }
    folder = arm_folder(run, label)
    key = digest_of({"settings": settings, "inputs": {name: sha256(path) for name, path in files.items()}})

    notes = [f"starting policy ready after {waited:.0f} s"] if waited > WORTH_SAYING else []

    def build() -> Tables:
        result = training.train_arm(pairs(), arm, start, folder, profile=profile, key=key)
        notes.extend(result.notes)
        return dict(zip(outputs, (result.log, result.health, result.generations), strict=True))

    anew = overwrite or not training.is_trained(folder, key)
    report = run.stage(f"train {label}", build, files=files, settings=settings, outputs=outputs, overwrite=anew)
    # The card is written anew when the arm is evaluated.
    run.files |= {path for path in folder.iterdir() if path.is_file() and path.name != "README.md"}
    return replace(report, notes=(*rate_warning(profile), *notes))


def rate_warning(profile: Profile) -> list[str]:
    """Warn where a policy that was not made here is trained at the default learning rate."""
    policy, rate = profile.policy.model, Training().learning_rate
    if policy == "small" or policy.startswith(PREFIX) or profile.training.learning_rate != rate:
        return []
    return [f"warning: training.learning_rate is {rate:g}, which fits the small policy; the authors trained at 1e-6"]


def weights_of(policy: str | Path) -> list[Path]:
    """Return the weights of a policy that lies on this machine's disk by its own path."""
    return sorted(Path(policy).glob("*.safetensors"))
