"""Fine-tune a classifier of natural language inference for C score or UE score, on transformers' Trainer.

    python examples/finetune_nli.py snli_1.0_train.jsonl --base bert-base-uncased --output scorers/snli
    persodpo score -p paper --set scoring.models.ue_score=scorers/snli

Files are read as they are published: SNLI (``*.jsonl`` with sentence1, sentence2, gold_label), SICK (``*.txt``, tabs),
Dialogue NLI (``*.json``, one list), or lines of JSON with premise, hypothesis and label. Rows without a label are skipped.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from persodpo.scoring.signals import CLASSES, SPELLINGS

#: Names of premise, hypothesis and label in the formats that are read.
FIELDS = (
    ("sentence1", "sentence2", "gold_label"),  # SNLI (Bowman et al. 2015)
    ("sentence_A", "sentence_B", "entailment_judgment"),  # SICK (Marelli et al. 2014)
    ("sentence_A", "sentence_B", "entailment_label"),  # its later edition
    ("sentence1", "sentence2", "label"),  # Dialogue NLI (Welleck et al. 2019)
    ("premise", "hypothesis", "label"),
)


def rows(path: Path) -> Iterator[dict[str, str]]:
    """Yield the rows of a file by its suffix."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".txt":
            yield from csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        elif path.suffix == ".json":
            yield from json.load(file)
        else:
            yield from (json.loads(line) for line in file if line.strip())


def examples(path: Path) -> list[tuple[str, str, int]]:
    """Return premise, hypothesis and class of every labelled row; ends the program at a row that does not fit."""
    pairs = []
    for number, row in enumerate(rows(path), 1):
        names = next((names for names in FIELDS if all(name in row for name in names)), None)
        if names is None:
            sys.exit(
                f"{path}, row {number}: it has none of the known fields: {' or '.join('/'.join(n) for n in FIELDS)}."
            )
        premise, hypothesis, label = (str(row[name]).strip() for name in names)
        if label in {"", "-"}:
            continue
        if label.lower() not in SPELLINGS:
            sys.exit(f"{path}, row {number}: label '{label}' is none of {', '.join(CLASSES)}; correct the row.")
        pairs.append((premise, hypothesis, CLASSES.index(SPELLINGS[label.lower()])))
    if not pairs:
        sys.exit(f"{path}: no row has a label, so there is nothing to learn from.")
    return pairs


def split(pairs: list[tuple[str, str, int]], share: float, seed: int) -> tuple[list[tuple[str, str, int]], ...]:
    """Hold out a share of the premises with all their pairs; returns what is learned from and what is held out."""
    premises = list(dict.fromkeys(premise for premise, _, _ in pairs))
    np.random.default_rng(seed).shuffle(premises)
    out = set(premises[: max(1, round(share * len(premises)))])
    return tuple([pair for pair in pairs if (pair[0] in out) == held] for held in (False, True))


def main() -> None:
    """Read the files, train, and leave model, tokenizer and held-out accuracy in a folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--base", required=True, help="model to start from: a folder or a name on the Hub")
    parser.add_argument("--output", type=Path, required=True, help="folder of the result")
    parser.add_argument("--held-out", type=Path, help="held-out file; default: a tenth of the premises")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=210, help="longest input, tokens")
    parser.add_argument("--seed", type=int, default=44)
    asked = parser.parse_args()
    pairs = [pair for path in asked.files for pair in examples(path)]
    train, held_out = (pairs, examples(asked.held_out)) if asked.held_out else split(pairs, 0.1, asked.seed)
    torch.manual_seed(asked.seed)
    tokenizer = AutoTokenizer.from_pretrained(asked.base)
    names = dict(enumerate(CLASSES))
    model = AutoModelForSequenceClassification.from_pretrained(
        asked.base, use_safetensors=True, num_labels=3, id2label=names, label2id={name: n for n, name in names.items()},
        ignore_mismatched_sizes=True, dtype=torch.float32,
    )  # fmt: skip
    sets = [
        Dataset.from_list([
            {**tokenizer(premise, hypothesis, truncation=True, max_length=asked.max_length), "labels": label}
            for premise, hypothesis, label in part
        ])
        for part in (train, held_out)
    ]  # fmt: skip
    args = TrainingArguments(
        str(asked.output / "training"), num_train_epochs=asked.epochs, learning_rate=asked.learning_rate,
        per_device_train_batch_size=asked.batch_size, per_device_eval_batch_size=4 * asked.batch_size, warmup_steps=0.1,
        train_sampling_strategy="group_by_length", bf16=torch.cuda.is_available(), use_cpu=not torch.cuda.is_available(),
        seed=asked.seed, save_strategy="no", report_to=[], logging_steps=50,
    )  # fmt: skip
    trainer = Trainer(
        model=model, args=args, train_dataset=sets[0], data_collator=DataCollatorWithPadding(tokenizer),
    )  # fmt: skip
    trainer.train()
    answers = trainer.predict(sets[1]).predictions.argmax(-1)
    truth = np.array([label for _, _, label in held_out])
    model.save_pretrained(asked.output)
    tokenizer.save_pretrained(asked.output)
    majority = max(Counter(truth.tolist()).values()) / len(truth)
    print(
        f"{(answers == truth).mean():.1%} of {len(truth):,} held-out pairs right; the commonest class alone: {majority:.1%}"
    )


if __name__ == "__main__":
    main()
