"""A scorer in, verdicts out: known answers it must give, and proof that each score belongs to its text.

Two kinds of probes. Known answers come from sixteen shipped dialogues (`persodpo.scoring.probe_cases`): a copied persona
must score above a denied one, the own context above another's, an empty response low. A probe asks for most of the cases,
not all of them, and for more than guessing gives. Order probes hold for every scorer: the same texts in another order, in
batches of other sizes or beside a very long text must get the same scores. The released coherence loop (audit A1) fails
the second kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from persodpo.errors import PersodpoError
from persodpo.imports import code_of
from persodpo.scoring import probe_cases
from persodpo.scoring.cache import ScoreCache
from persodpo.scoring.engine import fingerprint
from persodpo.scoring.probe_cases import CASES
from persodpo.scoring.scorers import Item, Scorer

#: Share of cases that must come out right; tossed coins reach it for one probe of sixteen cases in 26.
MOST = 0.75
#: Largest difference between two scores of one text; half precision rounds earlier.
TOLERANCE = 1e-5
HALF_TOLERANCE = 2e-2
#: Contexts and personas of other cases that each case is set against.
OTHERS = (3, 7, 11)
#: Words of the text that pads the others.
LONG = 400


@dataclass(frozen=True)
class Verdict:
    """What one probe found.

    Attributes:
        scorer: Name of the scorer.
        probe: Name of the probe.
        expected: What must hold.
        found: What was found.
        passed: Whether it holds.
    """

    scorer: str
    probe: str
    expected: str
    found: str
    passed: bool


@dataclass(frozen=True)
class Probe:
    """Items whose scores have a known relation.

    Attributes:
        name: Name of the probe.
        expected: The relation, in words.
        items: The items.
        holds: Their scores -> one truth value a case.
        share: Share of the cases in which it must hold.
    """

    name: str
    expected: str
    items: tuple[Item, ...]
    holds: Callable[[np.ndarray], np.ndarray]
    share: float = MOST

    def run(self, scorer: Scorer) -> Verdict:
        """Score the items and look whether the relation holds often enough."""
        right = self.holds(_score(scorer, self.items))
        passed = bool(right.mean() >= self.share)
        found = f"{int(right.sum())} of {len(right)} cases"
        return Verdict(scorer.name, self.name, f"{self.expected}, in {self.share:.0%} of cases", found, passed)


def _score(scorer: Scorer, items: Sequence[Item]) -> np.ndarray:
    values = scorer.score([scorer.texts(item) for item in items]).values
    if np.shape(values) != (len(items),) or not np.isfinite(values).all():
        raise PersodpoError(
            f"Scorer {scorer.name} did not give one finite score a text to its probes; check its model."
        )
    return np.asarray(values, dtype=np.float64)


def _other(place: int, step: int) -> probe_cases.Case:
    return CASES[(place + step) % len(CASES)]


def _paired(name: str, expected: str, better: Iterable[Item], worse: Iterable[Item], share: float = MOST) -> Probe:
    """The first item must score above the second."""
    left, right = tuple(better), tuple(worse)
    return Probe(name, expected, (*left, *right), lambda s: s[: len(left)] > s[len(left) :], share)


def _each(name: str, expected: str, items: Iterable[Item], holds: Callable[[np.ndarray], np.ndarray]) -> Probe:
    """Every item's score must be in a range."""
    return Probe(name, expected, tuple(items), holds)


def _crossed() -> list[tuple[probe_cases.Case, probe_cases.Case]]:
    """Each case with some others."""
    return [(case, _other(place, step)) for place, case in enumerate(CASES) for step in OTHERS]


_COPIES = tuple(case.item(case.personas[0]) for case in CASES)
_DENIALS = tuple(case.item(case.denial) for case in CASES)
_EMPTY = tuple(case.item("") for case in CASES)
#: A copy of the first persona sentence under the personas of another case.
_SWAPPED = tuple(case.item(case.personas[0], personas=other.personas) for case, other in _crossed())
#: The persona's sentence is also what was asked and what was answered.
_ECHOES = tuple(Item(case.personas, f"User1: {case.personas[0]}", case.personas[0], case.personas[0]) for case in CASES)

#: Known answers, by scorer.
KNOWN: dict[str, tuple[Probe, ...]] = {
    "coherence": (
        _paired(
            "shuffled context", "the reply scores higher under its own context than under another",
            (case.item() for case, _ in _crossed()),
            (case.item(context=other.context) for case, other in _crossed()),
        ),
        _paired("empty text", "the reply scores above an empty response", (case.item() for case in CASES), _EMPTY),
    ),
    "c_score": (
        _each("copied persona", "a copy of a persona sentence scores above 0", _COPIES, lambda s: s > 0),
        _paired("contradiction", "a denied persona sentence scores below its copy", _COPIES, _DENIALS),
        _each("swapped persona", "a copy under other personas does not score above 0", _SWAPPED, lambda s: s <= 0),
        _each("empty text", "an empty response does not score above 0", _EMPTY, lambda s: s <= 0),
    ),
    "ue_score": (
        _each("copied persona", "a persona sentence that was asked and answered scores 2", _ECHOES, lambda s: s == 2),
        _each("contradiction", "a denied persona sentence scores 0", _DENIALS, lambda s: s == 0),
        _each("swapped persona", "a copy under other personas scores 0", _SWAPPED, lambda s: s == 0),
        _each("empty text", "an empty response scores 0", _EMPTY, lambda s: s == 0),
    ),
    "persona_distance": (
        _each(
            "copied persona", "a persona's copy has cosine 1",
            (case.item(case.personas[0], personas=case.personas[:1]) for case in CASES), lambda s: s > 1 - 1e-6,
        ),
        _paired(
            "swapped persona", "the reply is nearer to its own personas than to others",
            (case.item() for case, _ in _crossed()),
            (case.item(personas=other.personas) for case, other in _crossed()),
        ),
        Probe("empty text", "an empty response has cosine 0", _EMPTY, lambda s: s == 0, 1.0),
    ),
}  # fmt: skip


def order_verdicts(scorer: Scorer) -> list[Verdict]:
    """Look whether scores follow their texts under permutation, other batch sizes, and padding."""
    items = [case.item(response) for case in CASES for response in (case.reply, case.personas[0], case.denial)]
    texts = list(dict.fromkeys(scorer.texts(item) for item in items))
    tolerance = HALF_TOLERANCE if "16" in str(scorer.identity().get("dtype", "")) else TOLERANCE
    whole = _values(scorer, texts)
    shuffled = np.random.default_rng(0).permutation(len(texts))
    back = np.argsort(shuffled)
    permuted = _values(scorer, [texts[place] for place in shuffled])[back]
    long = tuple(" ".join([text or "word"] * LONG) for text in texts[0])
    sized = [
        np.concatenate([_values(scorer, texts[s : s + size]) for s in range(0, len(texts), size)]) for size in (1, 7)
    ]
    found = {
        "permutation": [permuted],
        "batch size": sized,
        "padding": [_values(scorer, [long, *texts])[1:]],
    }
    return [_order_verdict(scorer.name, probe, whole, others, tolerance) for probe, others in found.items()]


def _values(scorer: Scorer, texts: Sequence[tuple[str, ...]]) -> np.ndarray:
    values = np.asarray(scorer.score(texts).values, dtype=np.float64)
    # Too few or too many values are a finding of the probe, not a crash of it.
    return values if values.shape == (len(texts),) else np.full(len(texts), np.nan)


def _order_verdict(name: str, probe: str, whole: np.ndarray, others: Sequence[np.ndarray], tolerance: float) -> Verdict:
    worst = float(np.max([np.abs(whole - other).max() for other in others]))
    return Verdict(
        name, probe, f"the same score for the same text, within {tolerance:g}", f"largest difference {worst:.1e}",
        worst <= tolerance,
    )  # fmt: skip


def probe(scorer: Scorer) -> list[Verdict]:
    """Run every probe that applies to a scorer.

    Args:
        scorer: A scorer; one whose name has no known answers here gets the order probes alone.

    Returns:
        One verdict a probe, known answers first.

    Raises:
        PersodpoError: The scorer does not give one finite score a text.
    """
    return [*(each.run(scorer) for each in KNOWN.get(scorer.name, ())), *order_verdicts(scorer)]


def probe_once(scorer: Scorer, cache: ScoreCache) -> list[Verdict]:
    """Return what `probe` finds, from the cache if the same scorer was probed by the same code."""
    number = cache.scorer(scorer.name, fingerprint(scorer))
    code = code_of(__name__, "persodpo.scoring")
    kept = cache.verdicts(number, code)
    if kept is not None:
        return [Verdict(**verdict) for verdict in kept]
    verdicts = probe(scorer)
    cache.keep_verdicts(number, code, [asdict(verdict) for verdict in verdicts])
    return verdicts


def _told(verdict: Verdict) -> str:
    return f"{verdict.probe} found {verdict.found} where {verdict.expected}"


def admit(verdicts: Sequence[Verdict], weights: dict[str, float], accepted: Sequence[str]) -> list[str]:
    """Refuse scorers that failed a probe, unless the profile accepts them by name.

    Args:
        verdicts: Of all scorers.
        weights: Weight of each signal in the quality score; a signal without weight does not enter it.
        accepted: Names of scorers that the profile accepts as they are.

    Returns:
        One warning a scorer that failed and enters the quality score all the same.

    Raises:
        PersodpoError: A scorer failed and was not accepted.
    """
    failed: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        if not verdict.passed and weights.get(verdict.scorer, 0.0) > 0:
            failed.setdefault(verdict.scorer, []).append(verdict)
    refused = [scorer for scorer in failed if scorer not in accepted]
    if refused:
        told = "; ".join(f"{name}: {', '.join(_told(verdict) for verdict in failed[name])}" for name in refused)
        raise PersodpoError(
            f"Scorers failed probes and may not enter the quality score ({told}). Use other models, set their weights to "
            f"0, or accept them by name with scoring.compute.accept_failed_probes=[{', '.join(failed)}]."
        )
    return [
        f"{scorer} enters the quality score although it failed its probes: {', '.join(v.probe for v in found)}"
        for scorer, found in failed.items()
    ]
