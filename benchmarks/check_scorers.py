"""How far do other scorers agree with the published scores, and what becomes of the ranking and the pairs?

Run by ``make check-scorers NLI=folder``; needs the published files and a folder with SICK (``SICK*.txt``) and SNLI
(``snli*.jsonl``). On the published responses, asked as released and corrected (audit A10):

- persona distance by the frozen encoder's cosine, and by a file of word vectors where ``--vectors`` names one;
- C score and UE score by a head on the frozen encoder that learns from those files, by the whole encoder fine-tuned on them
  (``examples/finetune_nli.py``; kept in ``runs/_finetuned``), and by checkpoints that ``--nli`` names.

Written down are Spearman's correlation with the published column, over all responses and within each model, the order of the
seven models, and how many of the perso pairs stay when this signal alone is exchanged.
"""

from __future__ import annotations

import argparse
import runpy
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from persodpo import stages
from persodpo.config import Profile, load_profile
from persodpo.files import PROJECT, git_commit
from persodpo.pairs import measured, pair_keys, rebuild
from persodpo.runfolder import RunFolder
from persodpo.scoring.heads import Head
from persodpo.scoring.models import Encoder, fetch_encoder, remembered
from persodpo.scoring.score import ScoreCache, Scorer, Way, readable, score_items
from persodpo.scoring.signals import Classifier, CScorer, NliModel, PersonaDistance, UEScorer
from persodpo.scoring.words import WordMeans

OUTPUT = PROJECT / "benchmarks" / "results" / "scorers.md"
FINETUNE = PROJECT / "examples" / "finetune_nli.py"
WAYS: tuple[Way, ...] = ("as_released", "corrected")
#: NLI pairs of each file that the head learns from, and held-out ones it is measured on.
LEARNED, HELD_OUT, SEED = 6_000, 1_000, 44
#: How the whole encoder is fine-tuned.
FINETUNED_BY = ("--epochs", "1", "--learning-rate", "1e-4", "--max-length", "64")


def nli_files(folder: Path) -> list[Path]:
    """Return the files of SICK and SNLI."""
    files = sorted([*folder.glob("SICK*.txt"), *folder.glob("snli*.jsonl")])
    return files or sys.exit(f"{folder} has neither SICK*.txt nor snli*.jsonl.")


def nli_head(files: Sequence[Path], encoder: Encoder) -> tuple[Head, str]:
    """Fit a head to SICK and SNLI; returns it and a line about its held-out accuracy."""
    read = runpy.run_path(str(FINETUNE))["examples"]
    draw, learned, held_out = np.random.default_rng(SEED), [], []
    for path in files:
        pairs = [((premise, hypothesis), label) for premise, hypothesis, label in read(path)]
        order = [pairs[place] for place in draw.permutation(len(pairs))[: LEARNED + HELD_OUT]]
        learned, held_out = learned + order[HELD_OUT:], held_out + order[:HELD_OUT]
    head = Head.fit(encoder, learned, SEED)
    found, names = head.accuracy(held_out), ", ".join(path.name for path in files)
    return head, (
        f"The head learns from {len(learned):,} pairs of {names}: {found['accuracy']:.1%} of {len(held_out):,} held-out "
        f"pairs right (commonest class {found['majority']:.1%})."
    )


def finetuned(files: Sequence[Path], folder: Path) -> tuple[NliModel, str]:
    """Fine-tune the whole encoder, unless that is done; returns it and what the script said of its held-out accuracy."""
    said = folder / "accuracy.txt"
    if not said.is_file():
        command = [sys.executable, FINETUNE, *files, "--base", fetch_encoder(), "--output", folder, *FINETUNED_BY]
        done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, text=True, check=True)
        said.write_text(done.stdout.splitlines()[-1])
    return NliModel(str(folder)), f"The encoder fine-tuned ({' '.join(FINETUNED_BY)}): {said.read_text()}."


def scorers_of(asked: argparse.Namespace) -> tuple[dict[str, dict[Way, Scorer]], str]:
    """Return the scorers by what they run, each asked in both ways, and what there is to say of what was trained."""
    encoder, files = Encoder(), nli_files(asked.folder)
    distances: dict[str, Encoder | Path] = {"encoder": encoder} | (
        {"word vectors": asked.vectors} if asked.vectors else {}
    )
    found: dict[str, dict[Way, Scorer]] = {}
    for label, source in distances.items():
        found[f"persona distance, {label}"] = {
            way: PersonaDistance(WordMeans(source, way) if isinstance(source, Path) else source, way) for way in WAYS
        }
    (head, of_head), (whole, of_whole) = nli_head(files, encoder), finetuned(files, asked.finetuned)
    classifiers: dict[str, Classifier] = {"head on the encoder": head, "encoder fine-tuned": whole}
    classifiers |= {Path(name).name: NliModel(name) for name in asked.nli}
    for label, classifier in classifiers.items():
        found[f"C score, {label}"] = {way: CScorer(classifier, way) for way in WAYS}
        found[f"UE score, {label}"] = {way: UEScorer(classifier, way) for way in WAYS}
    return found, f"{of_head} {of_whole}"


def spearman(ours: pd.Series, published: pd.Series) -> float:
    """Return the rank correlation, NaN where one side is constant."""
    constant = ours.max() == ours.min() or published.max() == published.min()
    return np.nan if constant else ours.corr(published, "spearman")


def compared(column: str, values: np.ndarray, published: pd.DataFrame) -> dict[str, str]:
    """Hold computed values against a published column, row by row."""
    both = published.assign(ours=values)
    within = [spearman(part["ours"], part[column]) for _, part in both.groupby("model")]
    within = [value for value in within if np.isfinite(value)] or [np.nan]
    means = both.groupby("model")[[column, "ours"]].mean()
    commonest = both["ours"].round(6).value_counts(normalize=True).iloc[0]
    return {
        "Spearman": f"{spearman(both['ours'], both[column]):.2f}",
        "within models": f"{min(within):.2f} to {max(within):.2f}",
        "order of models": f"{spearman(means['ours'], means[column]):.2f}",
        "commonest value": f"{commonest:.0%}",
    }


def kept_pairs(
    run: RunFolder, column: str, values: pd.DataFrame, dialogues: pd.DataFrame, profile: Profile
) -> tuple[int, int, int]:
    """Count the perso pairs by the published scores, those with one column exchanged, and those in both."""
    ids = set(dialogues["dialogue_id"])
    responses, scores = (frame[frame["dialogue_id"].isin(ids)] for frame in (run.read("responses"), run.read("scores")))
    base = measured(responses, scores)
    other = base.merge(values, on=["dialogue_id", "model"], how="left", validate="one_to_one")
    exchanged = other.assign(**{column: other["ours"].fillna(other[column])}).drop(columns="ours")
    before, after = (pair_keys(rebuild(responses, frame, dialogues, profile).pairs) for frame in (base, exchanged))
    return len(before), len(after), len(before & after)


def main() -> None:
    """Score, compare and write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, help="holds SICK*.txt and snli*.jsonl")
    parser.add_argument("--vectors", type=Path, help="a word2vec or GloVe file")
    parser.add_argument(
        "--finetuned", type=Path, default=PROJECT / "runs" / "_finetuned", help="the fine-tuned encoder"
    )
    parser.add_argument("--nli", nargs="*", default=[], help="folders of NLI classifiers")
    parser.add_argument("--dialogues", type=int, help="only the first of each split's dialogues; default: all")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    asked = parser.parse_args()
    run = RunFolder(load_profile("release"))
    stages.make(run.profile, "score")
    dialogues, responses = run.read("dialogues"), run.read("responses")
    some = dialogues[dialogues["dialogue_id"].isin(responses["dialogue_id"])]
    some = some.head(asked.dialogues) if asked.dialogues else some
    table, items = readable(responses[responses["dialogue_id"].isin(some["dialogue_id"])], dialogues)
    published = table.merge(measured(responses, run.read("scores")), on=["dialogue_id", "model"], how="left")
    there = published["persona_distance"].notna().to_numpy()
    rows, started = [], time.perf_counter()
    scorers, line = scorers_of(asked)
    with ScoreCache(run.root.with_name("_scores.sqlite")) as cache, remembered():
        for name, ways in scorers.items():
            for way, scorer in ways.items():
                values, _ = score_items(scorer, items, cache)
                ours = table[["dialogue_id", "model"]].assign(ours=values)
                before, after, kept = kept_pairs(run, scorer.name, ours, some, run.profile)
                row = {"scorer": name, "asked": way.replace("_", " ")}
                row |= compared(scorer.name, values[there], published[there])
                rows.append(
                    row | {"pairs": f"{after:,}", "of the published": f"{kept:,} of {before:,} ({kept / before:.0%})"}
                )
                print(rows[-1], f"{time.perf_counter() - started:.0f} s", flush=True)
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + " --- |" * len(rows[0])]
    lines += ["| " + " | ".join(row.values()) + " |" for row in rows]
    note = (
        f"{int(there.sum()):,} published responses to {len(some):,} dialogues; order of models: Spearman over the means of "
        f"the seven models; commonest value: share of the responses that get it; pairs: perso pairs of these dialogues when "
        f"this signal alone is exchanged. {line} Commit {git_commit()}."
    )
    asked.output.write_text("\n".join([*lines, "", note]) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
