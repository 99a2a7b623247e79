"""From pairs to trained policies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from persodpo.artifacts import RunFolder, digest_of, sha256
from persodpo.cards import write_model_card
from persodpo.config import with_overrides
from persodpo.errors import PersodpoError
from persodpo.release import corrections
from persodpo.settings import ArmName, Profile
from persodpo.stages.base import Reports, Targets, alone
from persodpo.stages.pairs import run_pairs
from persodpo.stages.policy import start_policy
from persodpo.tables import write_table
from persodpo.training.arms import ARMS, arm_name


@alone
def run_train(profile: Profile, overwrite: bool = False, arms: Sequence[str] = ()) -> Reports:
    """Train arms, those of the profile unless others are named, each from the same policy."""
    chosen = [arm_name(arm) for arm in arms or profile.training.arms]
    for arm in chosen:
        if ARMS[arm].pairs not in profile.pairs.sets:
            raise PersodpoError(f"Arm {arm} trains on {ARMS[arm].pairs} pairs; add {ARMS[arm].pairs} to pairs.sets.")
    reports = run_pairs(profile)
    for arm in chosen:
        reports += _train(profile, arm, overwrite)
    return reports


def _train(profile: Profile, arm: ArmName, overwrite: bool) -> Reports:
    """Train one arm."""
    from persodpo.training import (  # noqa: PLC0415 - torch is slow to load
        forward,
        health,
        loss,
        packing,
        reference,
        trainer,
    )
    from persodpo.training import run as training  # noqa: PLC0415

    run, spec, reports = RunFolder(profile), ARMS[arm], []
    source = run
    if spec.corrected:
        settings = [*corrections.correction_settings(), f"name={profile.name}-corrected"]
        source = RunFolder(with_overrides(profile, settings))
        reports = run_pairs(source.profile)
    table = f"pairs/{spec.pairs}"
    start = start_policy(run)
    outputs = [f"training/{arm}/{name}" for name in ("log", "health", "generations")]
    inputs = {table: source.path(table)} | _weights(start)
    settings_used = {
        "arm": asdict(spec),
        "policy": profile.policy.model,
        "training": profile.training.model_dump(mode="json", exclude={"arms"}),
        "reading": profile.completions.reading,
        "seed": profile.seed,
    }
    folder = run.path(outputs[0]).parent
    key = digest_of({"settings": settings_used, "inputs": {name: sha256(path) for name, path in inputs.items()}})

    def build(targets: Targets) -> None:
        made = training.train_arm(source.read(table), arm, start, folder, profile=profile, key=key)
        for output, frame in zip(outputs, (made.log, made.health, made.generations), strict=True):
            write_table(targets[output], output, frame)

    report = run.stage(
        f"train {arm}",
        inputs=inputs,
        settings=settings_used,
        outputs=outputs,
        code=[training, trainer, forward, packing, reference, loss, health],
        build=build,
        overwrite=overwrite or not training.is_trained(folder, key),
    )
    write_model_card(run, arm, source)
    return [*reports, report]


def _weights(policy: str | Path) -> dict[str, Path]:
    """Return the weights of a policy that lies on this machine's disk by its own path."""
    return {f"policy/{path.name}": path for path in sorted(Path(policy).glob("*.safetensors"))}
