"""What metrics are called in figures and tables, which way is better, and how their numbers are written."""

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


#: Places of numbers in tables.
PLACES = 3


def number(value: float, places: int = PLACES) -> str:
    """Write a number with a real minus sign, and without one if it rounds to zero."""
    text = f"{value:.{places}f}"
    return f"−{text[1:]}" if text.startswith("-") and float(text) else text.lstrip("-")


def p_text(p_value: float, bound: str = "") -> str:
    """Write a p-value to three places, with a sign before one that is a bound; one that would read as zero is smaller."""
    return "<0.001" if p_value < 0.0005 else f"{bound if p_value < 1 else ''}{p_value:.3f}"
