"""Coherence: how surely an encoder-decoder model answers Yes when asked whether a response fits its dialogue.

The question, the order of the parts and the marks between them are the interface of the published checkpoint
``MingZhong/unieval-dialog`` (UniEval, Zhong et al. 2022, github.com/maszhongming/UniEval: ``add_question``, task
dialogue): it was trained on exactly these. The score is P(Yes) / (P(Yes) + P(No)) of the first decoded token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from persodpo.errors import PersodpoError
from persodpo.runfolder import digest_of
from persodpo.scoring.models import Checkpoint, dtype_name
from persodpo.scoring.score import Item, Scored, distinct

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

QUESTION = "Is this a coherent response given the dialogue history?"


class CoherenceScorer(Checkpoint):
    """UniEval's dialogue coherence, 0..1.

    An input longer than ``max_length`` tokens loses its oldest turns (the released code cut the latest ones). Only where
    question, response and the end of the history alone are too long does the end go too.
    """

    name = "coherence"
    auto, kind = "AutoModelForSeq2SeqLM", "an encoder-decoder model such as T5"
    max_length = 1024

    @property
    def key(self) -> str:
        """Digest of checkpoint, longest input and number type."""
        return digest_of({"model": self.digest, "max_length": self.max_length, "dtype": dtype_name()})

    def score(self, items: Sequence[Item]) -> Scored:
        """Score each distinct pair of response and history once."""
        model, tokenizer = self.loaded
        pairs, places = distinct([(item.response, item.context) for item in items])
        answers = yes_no_tokens(tokenizer, self.source)
        rows, cut = encode(pairs, tokenizer, self.max_length)

        def forward(batch: dict[str, torch.Tensor]) -> torch.Tensor:
            first = batch["input_ids"].new_full((len(batch["input_ids"]), 1), model.config.decoder_start_token_id)
            logits: torch.Tensor = model(**batch, decoder_input_ids=first, use_cache=False).logits
            return logits[:, 0, answers]

        logits = self.run(rows, forward)
        # A softmax over two logits is their share of any larger softmax.
        shares = 1.0 / (1.0 + np.exp(logits[:, 1] - logits[:, 0]))
        return Scored(shares[places], cut[places])


def encode(
    pairs: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[dict[str, list[int]]], np.ndarray]:
    """Return model inputs of responses and histories, and the share of its tokens that each lost, 0..1, [pairs]."""
    written = [write_input(response, history) for response, history in pairs]
    encoded = tokenizer([text for text, _ in written], return_offsets_mapping=True, verbose=False)
    rows, cut = [], []
    for (_, history), all_ids, offsets in zip(written, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        ids, excess = list(all_ids), len(all_ids) - max_length
        cut.append(max(0, excess) / len(all_ids))
        if excess > 0:
            # A token may take in the space before it; the mark of the end has no place at all.
            inside = [n for n, (start, end) in enumerate(offsets) if start < history.stop and end > history.start]
            dropped = set(inside[:excess])
            ids = [token for n, token in enumerate(ids) if n not in dropped]
        rows.append({"input_ids": ids if len(ids) <= max_length else [*ids[: max_length - 1], ids[-1]]})
    return rows, np.array(cut)


def write_input(response: str, history: str) -> tuple[str, range]:
    """Write the input of UniEval's dialogue checkpoint; returns it and the places of the history's characters."""
    text = f"question: {QUESTION} </s> response: {response} </s> dialogue history: "
    return f"{text}{history}\n\n", range(len(text), len(text) + len(history))


def yes_no_tokens(tokenizer: PreTrainedTokenizerBase, checkpoint: str) -> list[int]:
    """Return the tokens that answer Yes and No; refused where these are not single, known and different tokens."""
    yes, no = (tokenizer(word, add_special_tokens=False)["input_ids"] for word in ("Yes", "No"))
    if len(yes) != 1 or len(no) != 1 or yes == no or tokenizer.unk_token_id in (yes[0], no[0]):
        raise PersodpoError(
            f"The tokenizer of '{checkpoint}' has no single, different tokens for Yes and No, so its first decoded token "
            "answers no question; name a checkpoint such as MingZhong/unieval-dialog."
        )
    return [yes[0], no[0]]
