"""Labelled examples and a base model in; a scorer's model, its held-out accuracy and its card out.

Classifiers learn the three classes of natural language inference, encoder-decoder models to answer Yes or No. Both are
trained by transformers' Trainer and keep the weights of the evaluation with the best held-out accuracy. Defaults are those
of the paper where it gives them.
"""

from __future__ import annotations

import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)
from transformers.utils.import_utils import is_in_notebook

from persodpo.folders import refuse_others, replaced
from persodpo.runfolder import sha256, versions, write_json
from persodpo.scoring import coherence, nli_model
from persodpo.scoring.checkpoints import Checkpoint
from persodpo.scoring.inference import Loaded, load_base_classifier, load_yes_no, quiet
from persodpo.scoring.nli_data import Examples, read_examples, split
from persodpo.scoring.scorer_card import FineTuning, Report, card

RECORD = "scorer.json"
#: Share of the steps over which the learning rate rises.
WARMUP = 0.1


class _Task(NamedTuple):
    """What differs between a classifier and a model that answers Yes or No."""

    labels: tuple[str, ...]
    encode: Callable[[Sequence[tuple[str, str]]], tuple[list[dict[str, list[int]]], Iterable[bool]]]
    target: Callable[[str], Any]
    collator: Any
    answers: Callable[[Any], torch.Tensor]
    loss: Callable[..., torch.Tensor] | None


def finetune_scorer(
    data: Sequence[Path],
    kind: str,
    base: str,
    folder: Path,
    *,
    settings: FineTuning,
    held_out: Sequence[Path] = (),
    fields: tuple[str, str, str] | None = None,
) -> Report:
    """Fine-tune a scorer's model on files of examples.

    Args:
        data: Files to learn from.
        kind: Their format; with ``coherence`` the model answers Yes or No, else it is a classifier.
        base: Folder or Hub name of the model to start from.
        folder: Where model (safetensors), tokenizer, record and card go. An earlier result there is replaced.
        settings: How.
        held_out: Files of held-out examples in the same format; without them some of ``data`` are held out.
        fields: Names of the files' fields, see `persodpo.scoring.nli_data.read_examples`.

    Returns:
        What it does on the held-out examples; it stands in the folder too.

    Raises:
        PersodpoError: A file, the base model or a setting does not fit, ``folder`` holds something else, or the disk fails.
    """
    refuse_others(folder, RECORD, "a fine-tuned scorer")
    train = read_examples(data, kind, fields)
    if held_out:
        test = read_examples(held_out, kind, fields)
    else:
        train, test = split(train, settings.held_out, settings.seed)
    checkpoint = Checkpoint(base)
    with own_randomness(settings.seed):
        load = load_yes_no if kind == "coherence" else load_base_classifier
        loaded = load(checkpoint, dtype="float32")
    reports: list[Report] = []

    def fill(scratch: Path) -> None:
        reports.append(finetune(loaded, train, test, scratch, settings))
        sources = {path.name: sha256(path) for path in (*data, *held_out)}
        record = {"base": base, "format": kind, "data": sources, "settings": asdict(settings), **asdict(reports[0])}
        write_json(scratch / RECORD, {**record, "versions": versions()})
        (scratch / "README.md").write_text(card(reports[0], settings, base, sources), encoding="utf-8")

    replaced(folder, fill)
    return reports[0]


def finetune(loaded: Loaded, train: Examples, held_out: Examples, folder: Path, settings: FineTuning) -> Report:
    """Train a model and save it with its tokenizer.

    Args:
        loaded: A classifier of `persodpo.scoring.nli_model.CLASSES`, or an encoder-decoder model; it is trained in place.
        train: Examples to learn from.
        held_out: Examples to measure on, and to choose the best weights by.
        folder: An existing folder.
        settings: How.

    Returns:
        What the saved weights do on the held-out examples.

    Raises:
        PersodpoError: The model takes fewer tokens than ``max_length``, or its tokenizer has no Yes and No.
    """
    started = time.perf_counter()
    task = _task(loaded, settings)
    (rows, cut), (test_rows, test_cut) = task.encode(train.inputs), task.encode(held_out.inputs)
    scratch = folder / ".training"
    with own_randomness(settings.seed), quiet():
        trainer = Trainer(
            model=loaded.model,
            args=_arguments(scratch, settings, len(rows)),
            train_dataset=_labelled(rows, train, task),
            eval_dataset=_labelled(test_rows, held_out, task),
            data_collator=task.collator,
            compute_metrics=lambda found: {
                "accuracy": float((found.predictions.argmax(-1) == _truth(found, task)).mean())
            },
            compute_loss_func=task.loss,
            preprocess_logits_for_metrics=lambda logits, _: task.answers(logits),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        found = trainer.predict(trainer.eval_dataset)
        shutil.rmtree(scratch, ignore_errors=True)
        loaded.model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
    counts = Counter(zip(_truth(found, task).tolist(), found.predictions.argmax(-1).tolist(), strict=True))
    places = range(len(task.labels))
    return Report(
        labels=task.labels,
        accuracy=sum(counts[n, n] for n in places) / len(held_out),
        majority=max(Counter(held_out.labels).values()) / len(held_out),
        confusion=tuple(tuple(counts[label, answer] for answer in places) for label in places),
        examples=len(train),
        held_out=len(held_out),
        skipped=train.skipped + held_out.skipped,
        cut=int(sum(cut) + sum(test_cut)),
        seconds=round(time.perf_counter() - started, 3),
    )


def _task(loaded: Loaded, settings: FineTuning) -> _Task:
    model, tokenizer = loaded
    if model.config.is_encoder_decoder:
        yes, no = coherence.yes_no_tokens(tokenizer, str(model.name_or_path))
        tokens = {coherence.YES: yes, coherence.NO: no}
        return _Task(
            labels=(coherence.YES, coherence.NO),
            encode=lambda inputs: coherence.encode(inputs, tokenizer, settings.max_length, "corrected"),
            target=lambda label: [tokens[label]],
            collator=DataCollatorForSeq2Seq(tokenizer, model),
            answers=lambda logits: (logits if isinstance(logits, torch.Tensor) else logits[0])[:, 0, [yes, no]],
            loss=lambda found, labels, **_: torch.nn.functional.cross_entropy(
                # Only the shares of Yes and No are read, so only they are learned.
                found.logits[:, 0, [yes, no]],
                (labels[:, 0] == no).long(),
            ),
        )
    nli_model.check_room(loaded, settings.max_length)
    order = nli_model.label_order(model.config.id2label or {}, None, str(model.name_or_path))
    labels = tuple(nli_model.CLASSES[order.index(n)] for n in range(len(order)))
    return _Task(
        labels=labels,
        encode=lambda inputs: nli_model.encode(inputs, tokenizer, settings.max_length),
        target=labels.index,
        collator=DataCollatorWithPadding(tokenizer),
        answers=lambda logits: logits,
        loss=None,
    )


def _labelled(rows: Sequence[dict[str, list[int]]], examples: Examples, task: _Task) -> list[dict[str, Any]]:
    pairs = zip(rows, examples.labels, strict=True)
    return [{**row, "labels": task.target(label)} for row, label in pairs]


def _truth(found: Any, task: _Task) -> np.ndarray:
    """Return the places of the true labels among the task's."""
    given = np.asarray(found.label_ids)
    if given.ndim == 1:
        return given
    places = {task.target(label)[0]: n for n, label in enumerate(task.labels)}
    return np.array([places[token] for token in given[:, 0].tolist()])


def _arguments(scratch: Path, settings: FineTuning, examples: int) -> TrainingArguments:
    steps = max(1, round(settings.epochs * -(-examples // settings.batch_size)))
    between = -(-steps // settings.evaluations)
    return TrainingArguments(
        output_dir=str(scratch),
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=4 * settings.batch_size,
        learning_rate=settings.learning_rate,
        warmup_steps=round(WARMUP * steps),
        train_sampling_strategy="group_by_length",
        eval_strategy="steps",
        eval_steps=between,
        save_strategy="steps",
        save_steps=between,
        save_total_limit=1,
        save_only_model=True,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        logging_strategy="no",
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=settings.seed,
        report_to=[],
        remove_unused_columns=False,
        disable_tqdm=not (sys.stderr.isatty() or is_in_notebook()),
    )


@contextmanager
def own_randomness(seed: int) -> Iterator[None]:
    """Draw from generators that start at ``seed``; the process's own go on afterwards as if nothing had been drawn."""
    before, numpy_before = random.getstate(), np.random.get_state()  # noqa: NPY002 - what the Trainer seeds
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(before)
            np.random.set_state(numpy_before)  # noqa: NPY002
