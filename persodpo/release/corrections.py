"""Each correction by itself: how the thresholds and the perso pairs change when one defect is mended."""

from __future__ import annotations

import pandas as pd

from persodpo.config import Profile
from persodpo.corrections import Correction
from persodpo.pairs import PairKeys, pair_keys, rebuild
from persodpo.release.audit import FINDINGS
from persodpo.release.findings.base import Material
from persodpo.release.published import TRAIN_SETS, PublishedSet, published_metrics


def mended_findings() -> dict[Correction, list[str]]:
    """Return every correction that a finding names, with the findings it mends."""
    named: dict[Correction, list[str]] = {}
    for finding in FINDINGS:
        if finding.correction:
            named.setdefault(finding.correction, []).append(finding.id)
    return named


def correction_effects(material: Material) -> pd.DataFrame:
    """Rebuild the perso pairs under each correction, and under all together.

    Args:
        material: Published files and tables made ``as_released``.

    Returns:
        Columns correction (finding ids), settings (switched on), low_threshold, high_threshold, responses (scored), pairs,
        shared_pairs (same prompt, chosen and rejected model as a pair of the released set) and jaccard (shared pairs
        over all pairs of either set).
    """
    metrics = published_metrics(material.files, _sets(material.profile), material.tables["responses"])
    variants: dict[str, list[Correction]] = {"as released": []}
    variants |= {" ".join(ids): [correction] for correction, ids in mended_findings().items()}
    variants["all"] = list(mended_findings())
    rows, released = [], None
    for name, switched in variants.items():
        low, high, responses, keys = _rebuild(material, metrics, material.profile.with_corrections(*switched))
        released = keys if released is None else released
        rows.append({
            "correction": name, "settings": " ".join(switched), "low_threshold": low, "high_threshold": high,
            "responses": responses, "pairs": len(keys), "shared_pairs": len(keys & released),
            "jaccard": len(keys & released) / len(keys | released),
        })  # fmt: skip
    return pd.DataFrame(rows)


def _sets(profile: Profile) -> list[PublishedSet]:
    return [which for which in TRAIN_SETS if which.model in profile.generation.models]


def _rebuild(material: Material, metrics: pd.DataFrame, profile: Profile) -> tuple[float, float, int, PairKeys]:
    """Read, score and pair the published train responses under ``profile``, without writing anything."""
    made = rebuild(material.tables["responses"], metrics, material.tables["dialogues"], profile)
    return made.ranking.low, made.ranking.high, made.ranking.scale.responses, pair_keys(made.pairs)
