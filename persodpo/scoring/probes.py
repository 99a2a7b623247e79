"""A scorer in, verdicts out: known answers it must give, and proof that each score belongs to its text.

Probes prove wiring and order, not judgement: a scorer that counts shared words can pass all of them. Known answers come from
sixteen dialogues written for this purpose (``probe_cases.json``): a copied persona must score above a denied one, the own
context above another's, an empty response low. A probe asks for most of the cases, and for more than guessing gives. Order
probes hold for every scorer: the same texts in another order, in batches of other sizes or beside a very long text must get
the same scores. The released coherence loop (audit A1) fails the second kind.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
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

    def item(self, response: str, *, personas: tuple[str, ...] = (), context: str = "") -> Item:
        """Return a response to the case, under its own or other personas or context; the reply is the reference."""
        return Item(personas or self.personas, context or self.context, self.reply, response)


_ROWS = json.loads(Path(__file__).with_name("probe_cases.json").read_text(encoding="utf-8"))
CASES = tuple(Case(**{**row, "personas": tuple(row["personas"])}) for row in _ROWS)


@dataclass(frozen=True)
class Verdict:
    """What one probe of one scorer showed: what must hold, what was found, and whether it passed."""

    scorer: str
    probe: str
    expected: str
    found: str
    passed: bool


class Probe(NamedTuple):
    """Items whose scores must have a known relation in a share of the cases.

    Attributes:
        name: Of the probe.
        expected: What must hold.
        items: As many for each case; those of a kind stand together.
        holds: Scores of each kind of items, [cases] each -> whether it holds, [cases].
        share: In how many of the cases, 0..1.
    """

    name: str
    expected: str
    items: Sequence[Sequence[Item]]
    holds: Callable[..., np.ndarray]
    share: float = MOST


_CROSSED = [(case, CASES[(place + OTHER) % len(CASES)]) for place, case in enumerate(CASES)]
_COPIES = [case.item(case.personas[0]) for case in CASES]
_DENIALS = [case.item(case.denial) for case in CASES]
_EMPTY = [case.item("") for case in CASES]
_REPLIES = [case.item(case.reply) for case in CASES]
#: A copy of the first persona sentence under the personas of another case.
_SWAPPED = [case.item(case.personas[0], personas=other.personas) for case, other in _CROSSED]
#: The persona's sentence is also what was asked and what was answered.
_ECHOES = [Item(case.personas, f"User1: {case.personas[0]}", case.personas[0], case.personas[0]) for case in CASES]
_ALONE = [case.item(case.personas[0], personas=case.personas[:1]) for case in CASES]
_ELSEWHERE = [case.item(case.reply, context=other.context) for case, other in _CROSSED]
_OF_OTHERS = [case.item(case.reply, personas=other.personas) for case, other in _CROSSED]

#: Known answers, by scorer.
KNOWN: dict[str, tuple[Probe, ...]] = {
    "coherence": (
        Probe("shuffled context", "the reply scores higher under its own context than under another",
              [_REPLIES, _ELSEWHERE], np.greater),
        Probe("empty text", "the reply scores above an empty response", [_REPLIES, _EMPTY], np.greater),
    ),
    "c_score": (
        Probe("copied persona", "a copy of a persona sentence scores above 0", [_COPIES], lambda s: s > 0),
        Probe("contradiction", "a denied persona sentence scores below its copy", [_COPIES, _DENIALS], np.greater),
        Probe("swapped persona", "a copy under other personas does not score above 0", [_SWAPPED], lambda s: s <= 0),
        Probe("empty text", "an empty response does not score above 0", [_EMPTY], lambda s: s <= 0),
    ),
    "ue_score": (
        Probe("copied persona", "a persona sentence that was asked and answered scores 2", [_ECHOES], lambda s: s == 2),
        Probe("contradiction", "a denied persona sentence scores 0", [_DENIALS], lambda s: s == 0),
        Probe("swapped persona", "a copy under other personas scores 0", [_SWAPPED], lambda s: s == 0),
        Probe("empty text", "an empty response scores 0", [_EMPTY], lambda s: s == 0),
    ),
    "persona_distance": (
        Probe("copied persona", "a persona's copy has cosine 1", [_ALONE], lambda s: s > 1 - 1e-6),
        Probe("swapped persona", "the reply is nearer to its own personas than to others",
              [_REPLIES, _OF_OTHERS], np.greater),
        Probe("empty text", "an empty response has cosine 0", [_EMPTY], lambda s: s == 0, 1.0),
    ),
}  # fmt: skip


def probe(scorer: Scorer) -> list[Verdict]:
    """Run every probe that applies to a scorer: known answers where its name has some, then order.

    Raises:
        PersodpoError: The scorer does not give one finite score a text.
    """
    with remembered():
        known = [_known_verdict(scorer, each) for each in KNOWN.get(scorer.name, ())]
    return [*known, *order_verdicts(scorer)]


def _known_verdict(scorer: Scorer, asked: Probe) -> Verdict:
    values = _values(scorer, [item for items in asked.items for item in items])
    if not np.isfinite(values).all():
        raise PersodpoError(
            f"Scorer {scorer.name} did not give one finite score a text to its probes; check its model."
        )
    right = asked.holds(*np.split(values, len(asked.items)))
    expected = f"{asked.expected}, in {asked.share:.0%} of cases"
    found = f"{int(right.sum())} of {len(right)} cases"
    return Verdict(scorer.name, asked.name, expected, found, bool(right.mean() >= asked.share))


def order_verdicts(scorer: Scorer) -> list[Verdict]:
    """Look whether scores follow their texts under permutation, other batch sizes, and padding."""
    items = [case.item(response) for case in CASES[:ORDERED] for response in (case.reply, case.denial)]
    whole = _values(scorer, items)
    order = np.random.default_rng(0).permutation(len(items))
    longer = [" ".join([text or "word"] * LONG) for text in (*items[0].personas, *items[0][1:])]
    parts = {size: [items[start : start + size] for start in range(0, len(items), size)] for size in (1, 4)}
    others = {
        "permutation": [_values(scorer, [items[place] for place in order])[np.argsort(order)]],
        "batch size": [np.concatenate([_values(scorer, part) for part in batches]) for batches in parts.values()],
        "padding": [_values(scorer, [Item(tuple(longer[:-3]), *longer[-3:]), *items])[1:]],
    }
    tolerance = HALF_TOLERANCE if "16" in dtype_name() else TOLERANCE
    expected = f"the same score for the same text, within {tolerance:g}"
    worst = {name: float(np.abs(np.array(values) - whole).max()) for name, values in others.items()}
    return [
        Verdict(scorer.name, name, expected, f"largest difference {apart:.1e}", apart <= tolerance)
        for name, apart in worst.items()
    ]


def _values(scorer: Scorer, items: Sequence[Item]) -> np.ndarray:
    values = np.asarray(scorer.score(items).values, dtype=np.float64)
    # Too few or too many values are what a probe finds, not a crash of it.
    return values if values.shape == (len(items),) else np.full(len(items), np.nan)


def admit(verdicts: Sequence[Verdict], weights: Mapping[str, float], accepted: Sequence[str]) -> list[str]:
    """Refuse scorers that failed a probe, unless the profile accepts them by name.

    Args:
        verdicts: Of all scorers.
        weights: Weight of each signal in the quality score; a signal without weight does not enter it.
        accepted: Names of scorers that the profile accepts as they are.

    Returns:
        One warning for each scorer that failed and enters the quality score all the same.
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
            f"Scorers failed probes and may not enter the quality score ({reasons}). Use other models, or more dialogues "
            "with other personas where heads on the encoder learn from them, set their weights to 0, or accept them by name "
            f"with scoring.compute.accept_failed_probes=[{', '.join(failed)}]."
        )
    return [
        f"{scorer} enters the quality score although it failed its probes: {', '.join(one.probe for one in verdicts)}"
        for scorer, verdicts in failed.items()
    ]
