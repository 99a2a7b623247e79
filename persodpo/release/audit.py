"""Published files and the run's tables in, the table of findings out."""

from __future__ import annotations

import pandas as pd

from persodpo.release.findings import pairs, results, scores
from persodpo.release.findings.base import Finding, Material

#: Every finding, in the order of its number.
FINDINGS: list[Finding] = sorted(
    [*scores.FINDINGS, *pairs.FINDINGS, *results.FINDINGS], key=lambda finding: int(finding.id[1:])
)


def findings_table(material: Material) -> pd.DataFrame:
    """Run every check.

    Args:
        material: Published files and tables made ``as_released``.

    Returns:
        Columns id, claim, verdict, evidence, consequence and setting (what corrects it).
    """
    rows = []
    for finding in FINDINGS:
        seen = finding.check(material)
        rows.append({
            "id": finding.id, "claim": finding.claim, "verdict": seen.verdict, "evidence": seen.text,
            "consequence": finding.consequence, "setting": finding.setting,
        })  # fmt: skip
    return pd.DataFrame(rows)
