"""C score and UE score: does a response follow from the persona, contradict it, or neither.

Both read a three-way classifier of natural language inference. The released method (audit A10) joined persona and
response into one text, although its classifiers had learned pairs, and gave UE score the gold answer where its
definition has the user's query. ``as_released`` does the same; ``corrected`` asks about true pairs, each persona sentence
by itself, and about the last turn of the user.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from persodpo.dialogues import SPEAKERS
from persodpo.scoring.nli_model import NliModel
from persodpo.scoring.scorers import Item, Scored, Way


class CScorer:
    """C score: 1 if the response follows from the persona, -1 if it contradicts it, else 0.

    ``as_released`` classifies one text: the persona sentences without a space between them, a space, the response.
    ``corrected`` classifies each persona sentence with the response; contradiction comes first: -1 if one sentence is
    contradicted, else 1 if one is entailed, else 0. Without a persona sentence nothing is asked: the value is 0 and such
    responses are reported as ``without_persona``.
    """

    name = "c_score"

    def __init__(self, model: NliModel, method: Way = "corrected") -> None:
        """Name the classifier and the method."""
        self.model, self.method = model, method

    def identity(self) -> Mapping[str, object]:
        """Return kind, checkpoint, settings and type of number."""
        return {"kind": "nli", "score": self.name, **self.model.identity(), "method": self.method}

    def texts(self, item: Item) -> tuple[str, ...]:
        """Return the response and the persona sentences, joined in ``as_released``."""
        return (item.response, *_personas(item, self.method))

    def score(self, texts: Sequence[tuple[str, ...]]) -> Scored:
        """Score response and persona sentences, each distinct input once.

        Args:
            texts: From `texts`.

        Returns:
            Values in -1..1.

        Raises:
            PersodpoError: As `NliModel.probabilities`.
        """
        asked: list[list[tuple[str, ...]]]
        if self.method == "as_released":
            asked = [[(f"{personas} {response}",)] for response, personas in texts]
        else:
            asked = [[(sentence, response) for sentence in sentences] for response, *sentences in texts]
        found, truncated = _ask(self.model, asked)
        values = np.array([_together(group) for group in found], dtype=np.float64)
        return Scored(values, truncated, {"without_persona": _share(not any(given[1:]) for given in texts)})


class UEScorer:
    """UE score: 2 if the response follows from the persona and from the query, 1 if only from the persona, else 0.

    ``as_released`` classifies two texts: the persona sentences without a space between them, `` [SEP] ``, the response;
    and the gold answer in the query's place, `` [SEP] ``, the response. ``corrected`` classifies pairs: each persona
    sentence with the response, of which one must entail it, and the last turn of the user with the response. A response
    without a persona sentence has 0, one without a turn of the user at most 1; both are reported.
    """

    name = "ue_score"

    def __init__(self, model: NliModel, method: Way = "corrected") -> None:
        """Name the classifier and the method."""
        self.model, self.method = model, method

    def identity(self) -> Mapping[str, object]:
        """Return kind, checkpoint, settings and type of number."""
        return {"kind": "nli", "score": self.name, **self.model.identity(), "method": self.method}

    def texts(self, item: Item) -> tuple[str, ...]:
        """Return response, query and persona sentences; joined and with the gold answer as query in ``as_released``."""
        query = item.reference if self.method == "as_released" else last_user_turn(item.context)
        return (item.response, query, *_personas(item, self.method))

    def score(self, texts: Sequence[tuple[str, ...]]) -> Scored:
        """Score response, query and persona sentences, each distinct input once.

        Args:
            texts: From `texts`.

        Returns:
            Values 0, 1 or 2.

        Raises:
            PersodpoError: As `NliModel.probabilities`.
        """
        asked: list[list[tuple[str, ...]]] = []
        for response, query, *sentences in texts:
            if self.method == "as_released":
                asked.append([(f"{before} [SEP] {response}",) for before in (query, *sentences)])
            else:
                # An empty query says nothing, and stands for its own absence.
                asked.append([(before, response) for before in (query, *sentences)])
        found, truncated = _ask(self.model, asked)
        entailed = [
            (group[0] == 1 and bool(given[1].strip()), (group[1:] == 1).any())
            for group, given in zip(found, texts, strict=True)
        ]
        values = np.array([2.0 if query and persona else float(persona) for query, persona in entailed])
        notes = {
            "without_persona": _share(not any(given[2:]) for given in texts),
            "without_query": _share(not given[1].strip() for given in texts),
        }
        return Scored(values, truncated, notes)


def _together(values: np.ndarray) -> float:
    """Return one value for those of several persona sentences, contradiction first; 0 if there are none."""
    if not len(values):
        return 0.0
    return float(values.min() if values.min() < 0 else values.max())


def last_user_turn(context: str) -> str:
    """Return the last turn of User1 in a context, without its speaker; empty if there is none.

    A line without a speaker goes on with the turn before it.
    """
    turns: list[str] = []
    for line in context.split("\n"):
        if line.startswith(SPEAKERS) or not turns:
            turns.append(line)
        else:
            turns[-1] += f"\n{line}"
    own = [turn for turn in turns if turn.startswith(SPEAKERS[0])]
    return own[-1].removeprefix(SPEAKERS[0]) if own else ""


def _personas(item: Item, method: Way) -> tuple[str, ...]:
    """Return the persona as one text, joined without a space as released, or as sentences that say something."""
    if method == "as_released":
        return ("".join(item.personas),)
    return tuple(sentence for sentence in item.personas if sentence.strip())


def _ask(model: NliModel, asked: Sequence[Sequence[tuple[str, ...]]]) -> tuple[list[np.ndarray], int]:
    """Classify each distinct input once; return the values of each group, and how many groups had an input cut."""
    place = {given: n for n, given in enumerate(dict.fromkeys(given for group in asked for given in group))}
    values, cut = model.values(list(place))
    groups = [np.array([place[given] for given in group], dtype=int) for group in asked]
    return [values[group] for group in groups], sum(bool(cut[group].any()) for group in groups)


def _share(flags: Iterable[bool]) -> float:
    found = list(flags)
    return sum(found) / len(found) if found else 0.0
