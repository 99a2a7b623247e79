"""Fill the numbers of README.md and docs/ from benchmarks/results (`make docs`): nobody types a measured number.

What stands between ``<!-- NAME -->`` and ``<!-- / -->`` is written anew. NAME is ``table RESULT``, a result's Markdown, or
``table RESULT N``, its N-th paragraph from 1; ``machine RESULT``; or a key of `facts`.
"""

from __future__ import annotations

import json
import re
from typing import Any

from measuring import RESULTS, pipes

from persodpo.corrections import CORRECTIONS
from persodpo.files import PROJECT
from persodpo.release.audit import FINDINGS

PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]
BLOCK = re.compile(r"<!-- (\w[^>]*) -->.*?<!-- / -->", re.DOTALL)
#: Columns of the README's table of arms.
ARMS = (
    "arm",
    "grounded",
    "repeats a sentence",
    "quality, failures imputed",
    "quality, successes alone",
    "failure ratio",
)


def paragraphs(result: str) -> list[str]:
    """Return the parts of a result's Markdown that blank lines separate."""
    return (RESULTS / f"{result}.md").read_text(encoding="utf-8").strip().split("\n\n")


def content(result: str) -> Any:
    """Return a result's JSON."""
    return json.loads((RESULTS / f"{result}.json").read_text(encoding="utf-8"))


def cells(result: str) -> list[list[str]]:
    """Return the rows of a result's first table, its head first."""
    return [line.strip("| ").split(" | ") for line in paragraphs(result)[0].splitlines() if "---" not in line]


def facts() -> dict[str, str]:
    """Return what is no table of a result."""
    mini, grouped, measured = content("mini"), content("train-cpu")["rungs"]["grouped"], content("generate")["measured"]
    faster = content("train-cpu-avx512")["rungs"]["grouped"]
    types = {name: count for name, count, _ in cells("architectures")[1:]}
    head, *arms = cells("mini")
    seconds = {
        "from nothing": mini["first seconds"],
        "with nothing changed": mini["second seconds"],
        **mini["notebooks"],
    }
    times = [(name, f"{time:,.0f}") for name, time in seconds.items()]
    return {
        "mini minutes": f"{mini['first seconds'] / 60:.0f}",
        "times trl": f"{grouped['against_trl']:.0f}",
        "times pairs": f"{grouped['against_pairs']:.1f}",
        "times trl faster": f"{faster['against_trl']:.0f}",
        "times pairs faster": f"{faster['against_pairs']:.1f}",
        "types": ", ".join(f"{count} {name}" for name, count in types.items()),
        "throughput": f"{measured['throughput']['share of the ideal']:.2f}",
        "arms": block(pipes(ARMS, ([line[head.index(name)] for name in ARMS] for line in arms))),
        "mini times": block(pipes(["run", "seconds"], [*times, ("memory at its peak", f"{mini['peak GiB']:.1f} GiB")])),
        "findings": block(pipes(["id", "claim", "what follows"], ((f.id, f.claim, f.consequence) for f in FINDINGS))),
        "corrections": block(pipes(["id", "what is done"], CORRECTIONS.items())),
    }


def block(text: str) -> str:
    """Return a part with a blank line before and after it."""
    return f"\n\n{text}\n\n"


def value(name: str) -> str:
    """Return what a block holds."""
    kind, _, rest = name.partition(" ")
    if kind == "machine":
        at = content(rest).get("machine", content(rest))
        commit, changed, _ = (at.get("commit") or "unknown").partition("-dirty")
        return f"{at['cores']} cores, commit {commit[:7]}{' with uncommitted changes' if changed else ''}"
    if kind == "table":
        result, _, number = rest.partition(" ")
        parts = paragraphs(result) if not number else [paragraphs(result)[int(number) - 1]]
        return block("\n\n".join(parts))
    return facts()[name]


def fill(text: str) -> str:
    """Write every block of a page anew."""
    return BLOCK.sub(lambda block: f"<!-- {block[1]} -->{value(block[1])}<!-- / -->", text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(fill(page.read_text(encoding="utf-8")), encoding="utf-8")
