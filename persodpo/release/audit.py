"""Published files and the run's tables in; the findings, and what each correction changes, out.

A finding is an entry of ``findings.yaml`` (what is claimed, what it means, what mends it) and a check of the same name.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import yaml

from persodpo.corrections import Correction
from persodpo.pairs import pair_keys, rebuild
from persodpo.release import checks
from persodpo.release.checks import Material
from persodpo.release.published import TRAIN_SETS, published_metrics


@dataclass(frozen=True)
class Finding:
    """A claim about the release: the fields of an entry of ``findings.yaml``."""

    id: str
    check: str
    claim: str
    evidence: str
    consequence: str
    correction: Correction | None = None
    mend: str = ""
    confirmed: str = "confirmed"

    def judge(self, material: Material) -> tuple[str, str]:
        """Recompute the claim; return the verdict and the numbers that it rests on, in a sentence or two."""
        holds, numbers = getattr(checks, self.check)(material)
        return self.confirmed if holds else "refuted", self.evidence.format(**numbers)


CLAIMS = Path(__file__).with_name("findings.yaml")
#: Every finding, in the order of its number.
FINDINGS = [Finding(**entry) for entry in yaml.safe_load(CLAIMS.read_text(encoding="utf-8"))]


def findings_table(material: Material) -> pd.DataFrame:
    """Run every check; returns columns id, claim, verdict, evidence, consequence and setting (what corrects it)."""
    rows = []
    for finding in FINDINGS:
        verdict, text = finding.judge(material)
        rows.append({
            "id": finding.id, "claim": finding.claim, "verdict": verdict, "evidence": text,
            "consequence": finding.consequence,
            "setting": f"corrections: [{finding.correction}]" if finding.correction else finding.mend,
        })  # fmt: skip
    return pd.DataFrame(rows)


def mended_findings() -> dict[Correction, list[str]]:
    """Return every correction that a finding names, with the findings it mends."""
    findings: dict[Correction, list[str]] = {}
    for finding in FINDINGS:
        if finding.correction:
            findings.setdefault(finding.correction, []).append(finding.id)
    return findings


def correction_effects(material: Material) -> pd.DataFrame:
    """Rebuild the perso pairs under each correction by itself, and under all together; nothing is written.

    Returns:
        Columns correction (finding ids), settings (switched on), low_threshold, high_threshold, responses (scored), pairs,
        shared_pairs (same prompt, chosen and rejected model as a pair of the released set) and jaccard (shared pairs
        over all pairs of either set).
    """
    responses, dialogues = (material.tables[name] for name in ("responses", "dialogues"))
    sets = [which for which in TRAIN_SETS if which.model in material.profile.generation.models]
    metrics = published_metrics(material.files, sets, responses)
    variants: dict[str, list[Correction]] = {"as released": []}
    variants |= {" ".join(ids): [correction] for correction, ids in mended_findings().items()}
    variants["all"] = list(mended_findings())
    rows, released = [], None
    for name, switched in variants.items():
        variant = rebuild(responses, metrics, dialogues, material.profile.with_corrections(*switched))
        keys, ranking = pair_keys(variant.pairs), variant.ranking
        released = keys if released is None else released
        rows.append({
            "correction": name, "settings": " ".join(switched), "low_threshold": ranking.low,
            "high_threshold": ranking.high, "responses": ranking.scale.responses, "pairs": len(keys),
            "shared_pairs": len(keys & released), "jaccard": len(keys & released) / len(keys | released),
        })  # fmt: skip
    return pd.DataFrame(rows)
