"""What the cards of pair sets and of trained arms share: their form, the choices behind a run's pairs, and their origin."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub.repocard_data import CardData

from persodpo.corrections import CORRECTIONS, Correction
from persodpo.errors import PersodpoError
from persodpo.evaluation.cells import TextTable
from persodpo.evaluation.exports import escape_markdown, markdown
from persodpo.release.audit import FINDINGS
from persodpo.release.corrections import mended_findings
from persodpo.runfolder import RunFolder, read_text, write_atomically

CARD = "README.md"
PAPER = "[PersoDPO](https://arxiv.org/abs/2602.04493)"


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


def choices(run: RunFolder) -> dict[Correction, bool]:
    """Return every choice between keeping and mending what the authors did that shaped a run's pairs.

    Args:
        run: A run folder with pairs, scores and responses; their provenance says what they were made with.

    Returns:
        Correction -> whether it is on, in the order of the audit. Those that no table depends on are left out.
    """
    tables = (run.provenance(name)["settings"]["corrections"] for name in ("pairs/gate", "scores", "responses"))
    used = {name: bool(on) for table in tables for name, on in table.items()}
    return {correction: used[correction] for correction in CORRECTIONS if correction in used}


def choices_table(run: RunFolder) -> str:
    """Return the choices behind a run's pairs as a table, and the settings beside them."""
    settings = run.provenance("pairs/gate")["settings"]
    rows = [(name, CORRECTIONS[name], "on" if on else "as released") for name, on in choices(run).items()]
    shown = table("As released keeps what the authors did:", ("correction", "what it does", "here"), rows)
    template = "in a file of the user's" if "/" in settings["prompts"]["template"] else settings["prompts"]["template"]
    return (
        f"{shown}\nPrompts: template {escape_markdown(template)}, at most {settings['prompts']['max_words']} words. "
        f"Seed {settings['seed']}."
    )


def defects(run: RunFolder) -> str:
    """Return the audit's findings that hold for a run's pairs, one a line, with the correction that mends each.

    The list may hold findings that none mends; it is never empty.
    """
    kept = _kept(run)
    lines = [
        f"- **{finding.id}** {escape_markdown(finding.claim)}"
        + (f" Mended by `{finding.setting}`." if finding.correction else "")
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


def _kept(run: RunFolder) -> set[str]:
    """Return the findings that hold for a run's pairs."""
    mends, settings = mended_findings(), run.provenance("scores")["settings"]["scoring"]
    kept = {"A20", "A21"}  # no correction mends these
    for correction, on in choices(run).items():
        if not on:
            kept |= {correction.rstrip("abc"), *mends.get(correction, ())}
    if run.provenance("responses")["settings"].get("source") == "published":
        kept |= {"A5", "A9"}
    if settings["target_words"] is None:
        kept.add("A19")
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
