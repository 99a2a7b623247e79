"""How a scorer was fine-tuned and what it does on held-out examples, as numbers and as a model card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class FineTuning:
    """How a scorer is fine-tuned; the defaults are the paper's where it gives them.

    Attributes:
        epochs: Passes over the examples.
        learning_rate: Highest learning rate; it rises over a tenth of the steps and falls in a straight line.
        batch_size: Examples of a step.
        max_length: Longest input, tokens.
        seed: Of new weights, the order of examples and the held-out split.
        held_out: Share of premises or contexts held out where no held-out file is given.
        evaluations: How often held-out accuracy is measured; the best weights are kept.
    """

    epochs: float = 1.0
    learning_rate: float = 2e-5
    batch_size: int = 16
    max_length: int = 210
    seed: int = 44
    held_out: float = 0.1
    evaluations: int = 4


@dataclass(frozen=True)
class Report:
    """What a fine-tuned model does on held-out examples.

    Attributes:
        labels: Its outputs.
        accuracy: Share of held-out examples that it gets right.
        majority: Share of the commonest label among them, which a constant answer gets right.
        confusion: Held-out examples by label (rows) and answer (columns), in the order of ``labels``.
        examples: Examples learned from.
        held_out: Held-out examples.
        skipped: Rows without a label.
        cut: Examples longer than the limit.
        seconds: Wall time.
    """

    labels: tuple[str, ...]
    accuracy: float
    majority: float
    confusion: tuple[tuple[int, ...], ...]
    examples: int
    held_out: int
    skipped: int
    cut: int
    seconds: float

    def __str__(self) -> str:
        """Return one line for logs."""
        return (
            f"{self.accuracy:.1%} of {self.held_out:,} held-out examples right (commonest label {self.majority:.1%}), "
            f"after {self.examples:,} examples in {self.seconds:.0f} s; {self.skipped:,} rows without a label skipped, "
            f"{self.cut:,} examples cut"
        )


def card(report: Report, settings: FineTuning, base: str, data: Mapping[str, str]) -> str:
    """Write the model card: what it was made from, how, and what it does on held-out examples."""
    head = " | ".join(("label \\ answer", *report.labels))
    rows = [" | ".join((label, *map(str, row))) for label, row in zip(report.labels, report.confusion, strict=True)]
    files = [f"- `{name}` (sha256 {digest[:12]})" for name, digest in data.items()]
    lines = [
        "# A scorer of persodpo", "",
        f"Made from `{base}` on:", "", *files, "",
        f"{report.examples:,} examples to learn from, {report.held_out:,} held out; {report.skipped:,} rows without a "
        f"label skipped, {report.cut:,} examples cut to {settings.max_length} tokens. {settings.epochs:g} epochs, batches "
        f"of {settings.batch_size}, learning rate {settings.learning_rate:g}, seed {settings.seed}.", "",
        f"Held-out accuracy **{report.accuracy:.4f}**; the commonest label alone gets {report.majority:.4f}. The weights "
        f"are the best of at most {settings.evaluations} evaluations on these same examples.", "",
        f"| {head} |", "|" + " --- |" * (len(report.labels) + 1), *(f"| {row} |" for row in rows), "",
    ]  # fmt: skip
    return "\n".join(lines)
