"""A classifier of natural language inference, its classes known by name whatever their order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from persodpo.errors import PersodpoError
from persodpo.scoring.checkpoints import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from persodpo.scoring.inference import Loaded

#: The classes in the order of their value: -1, 0 and 1.
CLASSES = ("contradiction", "neutral", "entailment")
#: Other names of the classes; positive and negative are those of Dialogue NLI (Welleck et al. 2019).
SPELLINGS = {
    "contradiction": "contradiction", "contradicts": "contradiction", "contradict": "contradiction",
    "contradictory": "contradiction", "negative": "contradiction",
    "neutral": "neutral", "unknown": "neutral",
    "entailment": "entailment", "entails": "entailment", "entail": "entailment", "positive": "entailment",
}  # fmt: skip


class NliModel:
    """A sequence-pair classifier with the classes of `CLASSES`, in any order.

    An input longer than ``max_length`` tokens is cut at its end; of a pair, whichever text is the longer loses tokens
    first. Cut inputs are counted.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        labels: Sequence[str] | None = None,
        max_length: int = 210,
        batch_tokens: int = 8192,
    ) -> None:
        """Name the model; it is loaded when something is classified.

        Args:
            checkpoint: Any BERT-like sequence classifier.
            labels: The class of each output, for checkpoints whose config names none; see `label_order`.
            max_length: Longest input, tokens; 210 in the published method.
            batch_tokens: Tokens of a batch, padding included; it changes speed and memory, never scores.
        """
        self.checkpoint, self.labels = checkpoint, tuple(labels) if labels else None
        self.max_length, self.batch_tokens = max_length, batch_tokens
        self._loaded: Loaded | None = None

    def identity(self) -> dict[str, object]:
        """Return checkpoint, settings and type of number."""
        labels = list(self.labels) if self.labels else None
        return {**self.checkpoint.identity(), "labels": labels, "max_length": self.max_length}

    def probabilities(self, inputs: Sequence[tuple[str, ...]]) -> tuple[np.ndarray, np.ndarray]:
        """Classify single texts or pairs.

        Args:
            inputs: A text, or premise and hypothesis; all of one kind.

        Returns:
            Probabilities in the order of `CLASSES`, [inputs, 3], and whether each input was cut, [inputs].

        Raises:
            PersodpoError: The model cannot be loaded, has other labels, takes fewer tokens than ``max_length``, or gives
                values that are not finite.
        """
        from persodpo.scoring import inference  # noqa: PLC0415 - torch takes seconds, identity needs none of it

        if not inputs:
            return np.empty((0, len(CLASSES))), np.empty(0, dtype=bool)
        loaded = self._load()
        columns = label_order(loaded.model.config.id2label or {}, self.labels, self.checkpoint.name)
        rows, cut = encode(inputs, loaded.tokenizer, self.max_length)
        logits = inference.run(loaded, rows, self.batch_tokens, lambda batch: loaded.model(**batch).logits)[:, columns]
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        return shares / shares.sum(axis=1, keepdims=True), cut

    def values(self, inputs: Sequence[tuple[str, ...]]) -> tuple[np.ndarray, np.ndarray]:
        """Return the likeliest class of each input as -1, 0 or 1, [inputs], and whether it was cut; as `probabilities`."""
        shares, cut = self.probabilities(inputs)
        return shares.argmax(axis=1) - 1, cut

    def _load(self) -> Loaded:
        from persodpo.scoring import inference  # noqa: PLC0415

        if self._loaded is None:
            loaded = inference.load_classifier(self.checkpoint)
            check_room(loaded, self.max_length)
            self._loaded = loaded
        return self._loaded


def encode(
    inputs: Sequence[tuple[str, ...]], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[dict[str, list[int]]], np.ndarray]:
    """Tokenise and cut single texts or pairs.

    Args:
        inputs: A text, or premise and hypothesis; all of one kind.
        tokenizer: A fast one.
        max_length: Longest input, tokens.

    Returns:
        The rows, and whether each was cut, [inputs].
    """

    def encoded(given: Sequence[tuple[str, ...]], **limits: Any) -> list[dict[str, list[int]]]:
        # Always lists: alone, a pair whose second text is empty would be taken for a single text.
        sides = [list(side) for side in zip(*given, strict=True)]
        found = tokenizer(*sides, return_attention_mask=False, verbose=False, **limits)
        return [{field: found[field][n] for field in found} for n in range(len(given))]

    rows = encoded(inputs)
    cut = np.array([len(row["input_ids"]) > max_length for row in rows])
    for n in np.flatnonzero(cut).tolist():
        rows[n] = encoded([inputs[n]], truncation="longest_first", max_length=max_length)[0]
    return rows, cut


def check_room(loaded: Loaded, max_length: int) -> None:
    """Refuse a limit above the number of tokens that a model takes.

    Raises:
        PersodpoError: The model takes fewer.
    """
    room = min(
        int(loaded.tokenizer.model_max_length),
        int(getattr(loaded.model.config, "max_position_embeddings", max_length)),
    )
    if room < max_length:
        raise PersodpoError(
            f"Model '{loaded.model.name_or_path}' takes {room} tokens, not {max_length}; lower the longest input to that."
        )


def label_order(
    id2label: Mapping[int, str] | Mapping[str, str], named: Sequence[str] | None, checkpoint: str
) -> list[int]:
    """Find which output of a classifier is which class.

    Args:
        id2label: The config's names of the outputs.
        named: The setting that names them, for configs that say LABEL_0, LABEL_1, LABEL_2.
        checkpoint: For messages.

    Returns:
        The output of each of `CLASSES`.

    Raises:
        PersodpoError: The names are not those of the three classes, or the setting contradicts the config.
    """
    own = [str(name) for _, name in sorted(id2label.items())]
    in_config, in_setting = classes(own), classes(named or ())
    if named and in_setting is None:
        raise PersodpoError(f"labels names {', '.join(named)}; it must name each of {', '.join(CLASSES)} once.")
    found = in_setting or in_config
    if found is None or len(own) != len(CLASSES):
        raise PersodpoError(
            f"Model '{checkpoint}' calls its outputs {', '.join(own)}, not {', '.join(CLASSES)}; name a classifier of "
            "these three, or set labels to the class of each of its three outputs in their order."
        )
    if in_setting and in_config and in_setting != in_config:
        raise PersodpoError(
            f"labels names {', '.join(named or ())}, but model '{checkpoint}' itself calls its outputs {', '.join(own)}; "
            "leave labels empty or name another model."
        )
    return [found.index(name) for name in CLASSES]


def classes(names: Sequence[str]) -> list[str] | None:
    """Return the classes that ``names`` stand for, None unless they are the three, each once."""
    found = [SPELLINGS.get(name.strip().lower(), "") for name in names]
    return found if sorted(found) == sorted(CLASSES) else None
