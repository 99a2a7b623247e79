"""A scorer in, verdicts out: known answers it must give, and proof that each score belongs to its text.

Probes prove wiring and order, not judgement: a scorer that counts shared words can pass all of them. Known answers come from
sixteen dialogues written for this purpose (``probe_cases.json``): a copied persona must score above a denied one, the own
context above another's, an empty response low. A probe asks for most of the cases, and for more than guessing gives. Order
probes hold for every scorer: the same texts in another order, in batches of other sizes or beside a very long text must get
the same scores. The released coherence loop (audit A1) fails the second kind.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from persodpo.errors import PersodpoError
from persodpo.scoring.encoder import remembered
from persodpo.scoring.models import dtype_name
from persodpo.scoring.score import Item, Scorer

#: Share of cases that must come out right; tossed coins reach it for one probe of sixteen cases in 26.
MOST = 0.75
#: Largest difference between two scores of one text; half precision rounds earlier.
TOLERANCE, HALF_TOLERANCE = 1e-5, 2e-2
#: Cases of the order probes, of two texts each: more than a window of the released loop; and how often the words of the text
#: that pads the others are repeated.
ORDERED, LONG = 5, 400
#: How far the other case is whose persona or context each case is set against.
OTHER = 7


class Case(NamedTuple):
    """A dialogue, a fitting reply, and a sentence that denies the first persona sentence."""

    personas: tuple[str, ...]
    context: str
    reply: str
    denial: str

    def item(self, response: str | None = None, *, personas: tuple[str, ...] | None = None, context: str = "") -> Item:
        """Return the case as an item, the reply unless another response is given; the reply is the reference."""
        answer = self.reply if response is None else response
        return Item(personas or self.personas, context or self.context, self.reply, answer)


CASES = tuple(
    Case(tuple(case["personas"]), case["context"], case["reply"], case["denial"])
    for case in json.loads(Path(__file__).with_name("probe_cases.json").read_text(encoding="utf-8"))
)


@dataclass(frozen=True)
class Verdict:
    """What one probe of one scorer showed: what must hold, what was found, and whether it passed."""

    scorer: str
    probe: str
    expected: str
    found: str
    passed: bool


@dataclass(frozen=True)
class Probe:
    """Items whose scores have a known relation, which must hold in a share of the cases."""

    name: str
    expected: str
    items: tuple[Item, ...]
    holds: Callable[[np.ndarray], np.ndarray]
    share: float = MOST

    def run(self, scorer: Scorer) -> Verdict:
        """Score the items and look whether the relation holds often enough."""
        values = np.asarray(scorer.score(self.items).values, dtype=np.float64)
        if values.shape != (len(self.items),) or not np.isfinite(values).all():
            raise PersodpoError(
                f"Scorer {scorer.name} did not give one finite score a text to its probes; check its model."
            )
        right = self.holds(values)
        expected = f"{self.expected}, in {self.share:.0%} of cases"
        found = f"{int(right.sum())} of {len(right)} cases"
        return Verdict(scorer.name, self.name, expected, found, bool(right.mean() >= self.share))


def _paired(name: str, expected: str, better: Iterable[Item], worse: Iterable[Item]) -> Probe:
    """Each first item must score above its second."""
    left, right = tuple(better), tuple(worse)
    return Probe(name, expected, (*left, *right), lambda s: s[: len(left)] > s[len(left) :])


_CROSSED = tuple((case, CASES[(place + OTHER) % len(CASES)]) for place, case in enumerate(CASES))
_COPIES = tuple(case.item(case.personas[0]) for case in CASES)
_DENIALS = tuple(case.item(case.denial) for case in CASES)
_EMPTY = tuple(case.item("") for case in CASES)
#: A copy of the first persona sentence under the personas of another case.
_SWAPPED = tuple(case.item(case.personas[0], personas=other.personas) for case, other in _CROSSED)
#: The persona's sentence is also what was asked and what was answered.
_ECHOES = tuple(Item(case.personas, f"User1: {case.personas[0]}", case.personas[0], case.personas[0]) for case in CASES)

#: Known answers, by scorer.
KNOWN: dict[str, tuple[Probe, ...]] = {
    "coherence": (
        _paired(
            "shuffled context", "the reply scores higher under its own context than under another",
            (case.item() for case in CASES), (case.item(context=other.context) for case, other in _CROSSED),
        ),
        _paired("empty text", "the reply scores above an empty response", (case.item() for case in CASES), _EMPTY),
    ),
    "c_score": (
        Probe("copied persona", "a copy of a persona sentence scores above 0", _COPIES, lambda s: s > 0),
        _paired("contradiction", "a denied persona sentence scores below its copy", _COPIES, _DENIALS),
        Probe("swapped persona", "a copy under other personas does not score above 0", _SWAPPED, lambda s: s <= 0),
        Probe("empty text", "an empty response does not score above 0", _EMPTY, lambda s: s <= 0),
    ),
    "ue_score": (
        Probe("copied persona", "a persona sentence that was asked and answered scores 2", _ECHOES, lambda s: s == 2),
        Probe("contradiction", "a denied persona sentence scores 0", _DENIALS, lambda s: s == 0),
        Probe("swapped persona", "a copy under other personas scores 0", _SWAPPED, lambda s: s == 0),
        Probe("empty text", "an empty response scores 0", _EMPTY, lambda s: s == 0),
    ),
    "persona_distance": (
        Probe(
            "copied persona", "a persona's copy has cosine 1",
            tuple(case.item(case.personas[0], personas=case.personas[:1]) for case in CASES), lambda s: s > 1 - 1e-6,
        ),
        _paired(
            "swapped persona", "the reply is nearer to its own personas than to others",
            (case.item() for case in CASES), (case.item(personas=other.personas) for case, other in _CROSSED),
        ),
        Probe("empty text", "an empty response has cosine 0", _EMPTY, lambda s: s == 0, 1.0),
    ),
}  # fmt: skip


def order_verdicts(scorer: Scorer) -> list[Verdict]:
    """Look whether scores follow their texts under permutation, other batch sizes, and padding."""
    items = [case.item(response) for case in CASES[:ORDERED] for response in (case.reply, case.denial)]
    whole = _values(scorer, items)
    order = np.random.default_rng(0).permutation(len(items))
    permuted = _values(scorer, [items[place] for place in order])[np.argsort(order)]
    sized = [
        np.concatenate([_values(scorer, items[start : start + size]) for start in range(0, len(items), size)])
        for size in (1, 4)
    ]
    padded = _values(scorer, [_lengthened(items[0]), *items])[1:]
    found = {"permutation": [permuted], "batch size": sized, "padding": [padded]}
    return [_order_verdict(scorer.name, name, whole, others) for name, others in found.items()]


def _lengthened(item: Item) -> Item:
    longer = [" ".join([text or "word"] * LONG) for text in (*item.personas, *item[1:])]
    return Item(tuple(longer[:-3]), *longer[-3:])


def _values(scorer: Scorer, items: Sequence[Item]) -> np.ndarray:
    values = np.asarray(scorer.score(items).values, dtype=np.float64)
    # Too few or too many values are what the probe finds, not a crash of it.
    return values if values.shape == (len(items),) else np.full(len(items), np.nan)


def _order_verdict(name: str, probe: str, whole: np.ndarray, others: Sequence[np.ndarray]) -> Verdict:
    tolerance = HALF_TOLERANCE if "16" in dtype_name() else TOLERANCE
    worst = float(np.max([np.abs(whole - other).max() for other in others]))
    expected = f"the same score for the same text, within {tolerance:g}"
    return Verdict(name, probe, expected, f"largest difference {worst:.1e}", worst <= tolerance)


def probe(scorer: Scorer) -> list[Verdict]:
    """Run every probe that applies to a scorer.

    Args:
        scorer: A scorer; one whose name has no known answers here gets the order probes alone.

    Returns:
        One verdict a probe, known answers first.

    Raises:
        PersodpoError: The scorer does not give one finite score a text.
    """
    with remembered():
        known = [each.run(scorer) for each in KNOWN.get(scorer.name, ())]
    return [*known, *order_verdicts(scorer)]


def admit(verdicts: Sequence[Verdict], weights: Mapping[str, float], accepted: Sequence[str]) -> list[str]:
    """Refuse scorers that failed a probe, unless the profile accepts them by name.

    Args:
        verdicts: Of all scorers.
        weights: Weight of each signal in the quality score; a signal without weight does not enter it.
        accepted: Names of scorers that the profile accepts as they are.

    Returns:
        One warning for each scorer that failed and enters the quality score all the same.

    Raises:
        PersodpoError: A scorer failed and was not accepted.
    """
    failed: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        if not verdict.passed and weights.get(verdict.scorer, 0.0) > 0:
            failed.setdefault(verdict.scorer, []).append(verdict)
    if refused := [scorer for scorer in failed if scorer not in accepted]:
        reasons = "; ".join(
            f"{name}: {', '.join(f'{one.probe} found {one.found} where {one.expected}' for one in failed[name])}"
            for name in refused
        )
        raise PersodpoError(
            f"Scorers failed probes and may not enter the quality score ({reasons}). Use other models, set their weights "
            f"to 0, or accept them by name with scoring.compute.accept_failed_probes=[{', '.join(failed)}]."
        )
    return [
        f"{scorer} enters the quality score although it failed its probes: {', '.join(one.probe for one in verdicts)}"
        for scorer, verdicts in failed.items()
    ]
