"""A profile in, what this machine lacks for it out; no model is loaded, nothing is sent, and nothing stays written."""

from __future__ import annotations

from collections.abc import Iterator

from persodpo.doctor.files import files
from persodpo.doctor.findings import Finding
from persodpo.doctor.machine import disk, gpu, keys, packages
from persodpo.doctor.outlook import estimates
from persodpo.doctor.sizes import Sizes
from persodpo.doctor.weights import weights
from persodpo.settings import Profile

__all__ = ["Finding", "diagnose", "estimates"]


def diagnose(profile: Profile) -> Iterator[Finding]:
    """Yield what is there and what is missing on this machine, each with its remedy.

    Args:
        profile: Any profile.

    Yields:
        Findings on files, weights, keys, packages, GPU and disk, in this order.
    """
    yield from files(profile)
    yield from weights(profile)
    yield from keys(profile)
    yield from packages(profile)
    sizes = Sizes(profile)
    yield gpu(profile, sizes)
    yield from disk(profile, sizes)
