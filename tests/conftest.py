"""Shared fixtures: a profile in a temporary folder, and one run on the published files where they are at hand."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import settings

from persodpo import stages
from persodpo.config import Profile, load_profile
from persodpo.files import RELEASE_VARIABLE
from persodpo.generation.store import Store
from persodpo.runfolder import RunFolder

# Two processes on two cores: more threads each would wait for one another.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# As the command sets it: kernels that tests start have threads of their own.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# A shell that starts the tests in its background has interrupts ignored, in them and in what they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("persodpo", derandomize=True, deadline=None, database=None)
settings.load_profile("persodpo")


#: Training of seconds: a policy that learns nothing, a few steps.
QUICK_TRAINING = [
    "policy.small.vocabulary=2000", "policy.small.hidden_size=32", "policy.small.steps=20", "training.epochs=0.05",
    "training.health_tokens=4",
]  # fmt: skip


def profile_in(folder: Path, *overrides: str) -> Profile:
    """Return the release profile with its folders under ``folder``."""
    places = [f"home={folder}"]
    return load_profile("release", [*places, *overrides])


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Let the kernel refuse files longer than ``size``, as it does on a disk that is too small."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """An empty store of answers."""
    with Store(tmp_path / "answers.sqlite") as opened:
        yield opened


@pytest.fixture
def profile(tmp_path: Path) -> Profile:
    """The release profile in a temporary folder."""
    return profile_in(tmp_path)


@pytest.fixture(scope="session")
def release_run(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> RunFolder:
    """A run folder made from the published files, audit included; processes of one test run share it."""
    if not os.environ.get(RELEASE_VARIABLE):
        pytest.skip(f"{RELEASE_VARIABLE} is not set: the published files are not at hand (persodpo fetch release)")
    base = tmp_path_factory.getbasetemp()
    made = profile_in((base if worker_id == "master" else base.parent) / "release")
    with RunFolder(made).locked(600.0):
        stages.make(made, "audit")
        stages.make(made, "evaluate")
    return RunFolder(made)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny matrices are faster on one thread, and sums come in one order."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
