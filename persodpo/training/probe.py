"""The random texts on which the guard compares packed rows with plain passes: as long as training makes them."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from persodpo.training.forward import base_model, text_config
from persodpo.training.packing import Group

#: Up to this length of training the random group is as long as a row may be, whatever the config names.
WHOLE = 1024
#: Parts of the names of config entries that hold a length from which on a model computes otherwise.
LENGTHS = (
    "window", "chunk", "local", "original_max", "topk", "top_k", "block", "span", "segment", "floor", "budget", "compress",
)  # fmt: skip
#: Tokens of the responses, and of the prompts of the shorter rows at most.
RESPONSES, PROMPT = (9, 6, 11), 14


def longest_window(model: Any, limit: int) -> int:
    """Return the longest window below ``limit`` that any config inside a model's config names, 0 for none.

    A window may be a product of two entries (blocks to look at, and their size).
    """
    pending, windows = [base_model(model).config], [0]
    while pending:
        config = pending.pop()
        entries = config if isinstance(config, dict) else vars(config)
        values = [
            (str(name), value)
            for name, entry in entries.items()
            for value in (entry if isinstance(entry, list | tuple) else [entry])
        ]
        pending.extend(value for _, value in values if hasattr(value, "to_dict") or isinstance(value, dict))
        named = {
            int(value) for name, value in values
            if isinstance(value, int | float) and value == value // 1 and any(part in name for part in LENGTHS)
        }  # fmt: skip
        windows.extend([*named, *(one * other for one, other in itertools.combinations(named, 2))])
    return max(window for window in windows if window < limit)


def random_groups(model: Any, max_length: int | None, token_budget: int) -> tuple[list[Group], Group]:
    """Return a group longer than the model's windows with shorter ones beside it, and the first filled up to a wide row."""
    config = text_config(model)
    positions = getattr(config, "max_position_embeddings", None) or token_budget
    # RoBERTa's positions begin after that of the padding, and an index beyond the table ends a GPU's process.
    padding = getattr(config, "pad_token_id", None)
    most = positions - (1 + padding if isinstance(padding, int) and 0 <= padding <= 2 else 0)
    rope = getattr(config, "rope_parameters", None)
    # A model with rope goes on beyond its positions, with other angles under some; others cannot go there.
    longest = (max_length or positions + token_budget) if rope else min(max_length or most, most)
    limit = max(longest, token_budget)
    changing = positions if "dynamic" in str(rope) or "longrope" in str(rope) else 0
    window = max(longest_window(model, limit), changing if changing < limit else 0)
    room = int(max(2, min(longest, max(window + sum(RESPONSES), WHOLE))))
    lengths = [min(length, max(1, room // 2)) for length in RESPONSES]
    prompt = max(1, room - max(lengths))
    source = torch.Generator().manual_seed(0)
    ids = _plain_ids(model)

    def draw(count: int) -> list[int]:
        return ids[torch.randint(len(ids), (count,), generator=source)].tolist()

    responses = [draw(length) for length in lengths]
    # A response that begins as another shows a leak most clearly in a model that has learned to repeat.
    responses[2][: min(lengths)] = responses[0][: min(lengths)]
    short = [Group(draw(count), responses) for count in (max(1, min(prompt // 2, PROMPT)), 1)]
    # A window that no sequence reaches may still be shorter than a row: fill the row up in the middle.
    wide = max(window + 1, min(token_budget, WHOLE))
    lacking, each = max(0, wide - prompt - sum(lengths)), max(1, room - prompt)
    filler = [draw(each) for _ in range(math.ceil(lacking / each))]
    first, start = responses[0].copy(), draw(prompt)
    # Texts of chats have ends inside, and a model may see no further back than to the last one.
    for tokens in (start, first):
        ends = [end for name in ("bos_token_id", "eos_token_id") for end in _as_list(getattr(config, name, None))]
        ends = [end for end in ends if 0 <= end < config.vocab_size]
        for place, end in zip(range(len(tokens) // 2, len(tokens)), ends[-2:], strict=False):
            tokens[place] = end
    return [Group(start, [first, *responses[1:]]), *short], Group(start, [first, *filler, *responses[1:]])


def _as_list(value: Any) -> list[int]:
    return value if isinstance(value, list) else [value] if isinstance(value, int) else []


def _plain_ids(model: Any) -> Tensor:
    """Return the token ids that stand for nothing but text, as far as the configs tell."""
    config = text_config(model)
    special: set[int] = set()
    for owner in (base_model(model).config, config):
        for name, value in vars(owner).items():
            if name.endswith(("token_id", "token_index")):
                special.update(_as_list(value))
    return torch.tensor([number for number in range(config.vocab_size) if number not in special])
