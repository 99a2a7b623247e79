"""What metrics are called in figures and tables, and which way is better."""

from __future__ import annotations

#: Name of each metric on axes and in headings, in the order in which tables and figures show them.
METRIC_LABELS: dict[str, str] = {
    "grounded": "Grounded",
    "quality": "Quality",
    "coherence": "Coherence",
    "c_score": "C score",
    "ue_score": "UE score",
    "persona_distance": "Persona distance",
    "compliance": "Compliance",
    "rouge_l": "ROUGE-L",
    "repeats": "Repeats a sentence",
    "failure_ratio": "Failure ratio",
    "response_time": "Response time (s)",
}
#: Metrics of which less is better.
LOWER_IS_BETTER = frozenset({"failure_ratio", "repeats", "response_time"})


def metric_label(metric: str) -> str:
    """Return the name of a metric for readers; one that is not in `METRIC_LABELS` keeps its own."""
    return METRIC_LABELS.get(metric, metric.replace("_", " "))


def metric_order(metric: str) -> tuple[int, str]:
    """Return a sort key: the order of `METRIC_LABELS`, all others after them."""
    names = list(METRIC_LABELS)
    return (names.index(metric) if metric in names else len(names), metric)
