"""Coherence: how surely an encoder-decoder model answers Yes when asked whether a response fits its dialogue.

The question, the order of the parts and the marks between them are the interface of the published checkpoint
``MingZhong/unieval-dialog`` (UniEval, Zhong et al. 2022, github.com/maszhongming/UniEval: ``add_question``, task
dialogue): it was trained on exactly these. A turn of the dialogue history ends with a line end, the history with two.
The score is P(Yes) / (P(Yes) + P(No)) of the first decoded token.

Of UniEval's five dimensions of dialogues this one alone is computed. The released method computed five to keep one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from persodpo.errors import PersodpoError
from persodpo.scoring.checkpoints import Checkpoint
from persodpo.scoring.scorers import Item, Scored, Way

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from persodpo.scoring.inference import Loaded

QUESTION = "Is this a coherent response given the dialogue history?"
YES, NO = "Yes", "No"


class CoherenceScorer:
    """UniEval's dialogue coherence.

    An input longer than ``max_length`` tokens is cut. ``as_released`` cuts its end, and so the turns that the response
    answers; ``corrected`` cuts the oldest turns and keeps question, response and the latest turns. Only where those
    alone are too long does the end go too. Cut inputs are counted.
    """

    name = "coherence"

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        max_length: int = 1024,
        truncation: Way = "corrected",
        batch_tokens: int = 8192,
    ) -> None:
        """Name the model; it is loaded when something is scored.

        Args:
            checkpoint: An encoder-decoder model that was trained on `QUESTION`.
            max_length: Longest input, tokens; 1,024 in the published method.
            truncation: Which end of a longer input is cut.
            batch_tokens: Tokens of a batch, padding included; it changes speed and memory, never scores.
        """
        self.checkpoint, self.max_length = checkpoint, max_length
        self.truncation, self.batch_tokens = truncation, batch_tokens
        self._loaded: Loaded | None = None

    def identity(self) -> Mapping[str, object]:
        """Return kind, checkpoint, settings and type of number."""
        settings = {"max_length": self.max_length, "truncation": self.truncation}
        return {"kind": "unieval", **self.checkpoint.identity(), **settings}

    def texts(self, item: Item) -> tuple[str, ...]:
        """Return the response and the dialogue history."""
        return (item.response, item.context)

    def score(self, texts: Sequence[tuple[str, ...]]) -> Scored:
        """Score response and context, each distinct input once.

        Args:
            texts: From `texts`.

        Returns:
            Values in 0..1.

        Raises:
            PersodpoError: The model cannot be loaded, its tokenizer has no single tokens for Yes and No, or it gives
                values that are not finite.
        """
        if not texts:
            return Scored(np.empty(0), 0, {})
        distinct = {given: place for place, given in enumerate(dict.fromkeys(texts))}
        shares, cut = self._yes_shares(list(distinct))
        places = [distinct[given] for given in texts]
        return Scored(shares[places], sum(cut[place] for place in places), {})

    def _yes_shares(self, inputs: Sequence[tuple[str, ...]]) -> tuple[np.ndarray, list[bool]]:
        """Return P(Yes) / (P(Yes) + P(No)) of each input, and whether it was cut."""
        import torch  # noqa: PLC0415 - takes seconds, and a scorer may only be asked for its identity

        from persodpo.scoring import inference  # noqa: PLC0415

        if self._loaded is None:
            self._loaded = inference.load_yes_no(self.checkpoint)
        loaded = self._loaded
        answers = yes_no_tokens(loaded.tokenizer, self.checkpoint.name)
        rows, cut = encode(inputs, loaded.tokenizer, self.max_length, self.truncation)
        start = loaded.model.config.decoder_start_token_id

        def forward(batch: dict[str, torch.Tensor]) -> torch.Tensor:
            first = torch.full((len(batch["input_ids"]), 1), start, device=loaded.model.device)
            logits: torch.Tensor = loaded.model(**batch, decoder_input_ids=first, use_cache=False).logits
            return logits[:, 0, answers]

        logits = inference.run(loaded, rows, self.batch_tokens, forward)
        # A softmax over two logits is their share of any larger softmax.
        return 1.0 / (1.0 + np.exp(logits[:, 1] - logits[:, 0])), cut


def encode(
    inputs: Sequence[Sequence[str]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    truncation: Way,
) -> tuple[list[dict[str, list[int]]], list[bool]]:
    """Write, tokenise and cut model inputs.

    Args:
        inputs: Response and history of each.
        tokenizer: A fast one.
        max_length: Longest input, tokens.
        truncation: Which end of a longer input is cut, see `CoherenceScorer`.

    Returns:
        The rows, and whether each was cut.
    """
    written = [write_input(response, history) for response, history in inputs]
    encoded = tokenizer([text for text, _ in written], return_offsets_mapping=True, verbose=False)
    rows, cut = [], []
    for (_, history), all_ids, offsets in zip(written, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        ids, excess = list(all_ids), len(all_ids) - max_length
        cut.append(excess > 0)
        if excess > 0 and truncation == "corrected":
            # A token may take in the space before it; what marks the end of the input has no place at all.
            inside = [n for n, (start, end) in enumerate(offsets) if start < history.stop and end > history.start]
            gone = set(inside[:excess])
            ids = [token for n, token in enumerate(ids) if n not in gone]
        rows.append({"input_ids": ids if len(ids) <= max_length else [*ids[: max_length - 1], ids[-1]]})
    return rows, cut


def write_input(response: str, history: str) -> tuple[str, range]:
    """Write the input of UniEval's dialogue checkpoint; returns it and the places of the history's characters."""
    text = f"question: {QUESTION} </s> response: {response} </s> dialogue history: "
    return f"{text}{history}\n\n", range(len(text), len(text) + len(history))


def yes_no_tokens(tokenizer: PreTrainedTokenizerBase, checkpoint: str) -> list[int]:
    """Return the tokens that answer Yes and No.

    Args:
        tokenizer: The model's tokenizer.
        checkpoint: The model's name, for messages.

    Returns:
        The token of Yes and that of No.

    Raises:
        PersodpoError: One is not a single token, is unknown, or they are the same.
    """
    yes, no = (tokenizer(word, add_special_tokens=False)["input_ids"] for word in (YES, NO))
    if len(yes) != 1 or len(no) != 1 or yes == no or tokenizer.unk_token_id in (yes[0], no[0]):
        raise PersodpoError(
            f"The tokenizer of '{checkpoint}' has no single, different tokens for {YES} and {NO}, so its "
            "first decoded token answers no question; name a checkpoint such as MingZhong/unieval-dialog."
        )
    return [yes[0], no[0]]
