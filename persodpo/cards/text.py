"""What the cards of pair sets and of trained arms share: their form, the choices behind a run's pairs, and their origin."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.repocard_data import CardData

from persodpo.artifacts import RunFolder, read_text, write_atomically
from persodpo.errors import PersodpoError
from persodpo.evaluation.cells import TextTable
from persodpo.evaluation.exports import escape_markdown, markdown
from persodpo.release.audit import FINDINGS
from persodpo.release.corrections import correction_settings

CARD = "README.md"
PAPER = "[PersoDPO](https://arxiv.org/abs/2602.04493)"
#: Values of a setting that keeps or mends what the authors did.
_CHOICES = ("as_released", "corrected", "strict")
#: Settings that a finding speaks of without naming them as what mends it.
_ALSO = {"generation.token_budget": "A5", "scoring.compute.nli": "A10", "scoring.compute.words": "A10"}


def write_card(path: Path, text: str) -> Path:
    """Write a card to ``path`` unless it stands there already, and return the path.

    Raises:
        PersodpoError: The disk fails.
    """
    if read_text(path) != text:
        write_atomically(path, lambda temporary: _fill(temporary, text))
    return path


def _fill(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def card(data: CardData, parts: Iterable[str]) -> str:
    """Return a card.

    Args:
        data: What loaders read, for the front matter.
        parts: Headings, paragraphs and tables in Markdown; empty ones are left out.
    """
    body = "\n\n".join(part.strip("\n") for part in parts if part)
    return f"---\n{data.to_yaml()}\n---\n\n{body}\n"


def table(caption: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table whose caption and cells are escaped."""
    return markdown(TextTable(caption, tuple(columns), tuple(tuple(row) for row in rows), ()))


def code(language: str, text: str) -> str:
    """Return a fenced block."""
    return "\n".join([f"```{language}", text.strip("\n"), "```"])


def number(value: float) -> str:
    """Return a count, or a median of counts, with its thousands parted."""
    return "not known" if math.isnan(value) else f"{value:,.10g}"


def command(run: RunFolder, stage: str) -> str:
    """Return the command that runs a stage of a run, for messages."""
    return run.command(stage)


def pair_sets(run: RunFolder) -> list[str]:
    """Return a run's pair sets, after checking that they were made from the tables beside them.

    Raises:
        PersodpoError: The gate report is missing or edited, or another table lies in the folder than pairs were made from.
    """
    run.checked_path("pairs/gate")
    made = run.provenance("pairs/gate")
    for name, digest in made["inputs"].items():
        if run.provenance(name).get("sha256") != digest:
            raise PersodpoError(
                f"The pairs of run {run.profile.name} were made from another table {name} than lies in {run.root}; make "
                f"them again with {command(run, 'pairs')}."
            )
    sets: list[str] = made["settings"]["pairs"]["sets"]
    return sets


def choices(run: RunFolder) -> dict[str, str]:
    """Return every choice between keeping and mending what the authors did that shaped a run's pairs.

    Args:
        run: A run folder with pairs, scores and responses; their provenance says what they were made with.

    Returns:
        Setting, as section.key -> ``as_released``, ``corrected`` or ``strict``. Settings that were not used are left out.
    """
    pairs, scores, responses = (run.provenance(name)["settings"] for name in ("pairs/gate", "scores", "responses"))
    used = {
        "completions": {"reading": responses["reading"]},
        "generation": responses.get("generation", {}),
        "pairs": pairs["pairs"],
        "prompts": pairs["prompts"],
        "scoring": scores["scoring"],
    }
    return {name: value for name, value in _leaves(used) if value in _CHOICES}


def _leaves(settings: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value of nested settings under its dotted name."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{before}{key}.")
        else:
            yield before + key, value


def choices_table(run: RunFolder) -> str:
    """Return the choices behind a run's pairs as a table, and the settings beside them."""
    settings = run.provenance("pairs/gate")["settings"]
    shown = table("As released keeps what the authors did:", ("setting", "value"), choices(run).items())
    template = "in a file of the user's" if "/" in settings["prompts"]["template"] else settings["prompts"]["template"]
    return (
        f"{shown}\nPrompts: template {escape_markdown(template)}, at most {settings['prompts']['max_words']} words. "
        f"Seed {settings['seed']}."
    )


def defects(run: RunFolder) -> str:
    """Return the audit's findings that hold for a run's pairs, one a line, with the setting that mends each.

    The list may hold findings that no setting mends; it is never empty.
    """
    mends = {finding: setting for setting, ids in correction_settings().items() for finding in ids}
    kept = _kept(run, mends)
    lines = [
        f"- **{finding.id}** {escape_markdown(finding.claim)}"
        + (f" Mended by `{mends[finding.id].replace('=', ': ')}`." if finding.id in mends else "")
        for finding in FINDINGS
        if finding.id in kept
    ]
    return "\n".join(
        [
            "Findings of the audit whose cause is at work here, too, with its numbers on the published files:",
            "",
            *lines,
        ]
    )


def _kept(run: RunFolder, mends: Mapping[str, str]) -> set[str]:
    """Return the findings that hold for a run's pairs."""
    found, settings = choices(run), run.provenance("scores")["settings"]["scoring"]
    kept = set()
    for finding, setting in mends.items():
        name, _, mended = setting.partition("=")
        if found.get(name) not in (None, mended):
            kept.add(finding)
    kept |= {finding for setting, finding in _ALSO.items() if found.get(setting) == "as_released"}
    kept |= {"A20", "A21"}  # no setting mends these
    if run.provenance("responses")["settings"].get("source") == "published":
        kept |= {"A5", "A9"}
    if settings["target_words"] is None:
        kept.add("A19")
    if settings["source"] != "published":
        kept.discard("A1")
    if run.provenance("responses")["settings"].get("source") == "csv":
        kept -= {"A12", "A20"}  # said of splits and of a trained model that are not here
    if "perso" not in run.provenance("pairs/gate")["settings"]["pairs"]["sets"]:
        kept.discard("A4")
    return kept


def origin(run: RunFolder, names: Iterable[str]) -> str:
    """Return what tables were made from: their hashes, the profile, commit and versions."""
    made = {name: run.provenance(name) for name in names}
    rows = [(name, number(content["rows"]), content["sha256"]) for name, content in made.items()]
    last = list(made.values())[-1]
    versions = ", ".join(f"{name} {version}" for name, version in last["versions"].items())
    return (
        table("Tables as written, by their provenance files:", ("table", "rows", "sha256"), rows)
        + f"\nProfile {last['profile']} (sha256 {last['profile_sha256']}), commit {last['commit'] or 'not known'}; "
        + f"{versions}."
    )
