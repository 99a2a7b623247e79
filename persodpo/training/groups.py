"""A dataset of pairs in, batches of packed rows out: what is grouped by prompt, what is left out, what is split.

One row of a grouped dataset is a prompt with its distinct responses and the indices of its pairs (`GROUP_COLUMNS`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from numpy.typing import NDArray

from persodpo.errors import PersodpoError
from persodpo.training.loss import Weighting, pair_weights
from persodpo.training.packing import Group, Layout, PackedRows, pack

#: Columns of a grouped dataset -> fields of a group.
GROUP_COLUMNS = {
    "prompt_ids": "prompt", "response_ids": "responses", "chosen": "chosen", "rejected": "rejected", "weights": "weights",
    "pair_ids": "pair_ids",
}  # fmt: skip
SCORES = ("score_chosen", "score_rejected")
#: Why a pair is left out: its prompt fills the whole length limit or has no token, a side has none, or both are the same.
LONG_PROMPT, EMPTY, IDENTICAL = "prompt as long as max_length", "empty response", "chosen equals rejected"
NO_PROMPT = "prompt without tokens"
REASONS = (LONG_PROMPT, NO_PROMPT, EMPTY, IDENTICAL)


class Skipped(Counter[str]):
    """Pairs that were left out, by reason."""

    def __str__(self) -> str:
        """Say how many were left out, and why."""
        counts = ", ".join(f"{self[reason]} ({reason})" for reason in REASONS if self[reason])
        return f"left out pairs: {counts or 'none'}"


class TokenPair(NamedTuple):
    """Token ids of prompt, chosen and rejected response, end of sequence included, and the weight of the pair's loss."""

    prompt: Sequence[int]
    chosen: Sequence[int]
    rejected: Sequence[int]
    weight: float = 1.0


def group_pairs(pairs: Sequence[TokenPair], max_length: int | None, first: int = 0) -> tuple[list[Group], Skipped]:
    """Group pairs by prompt and keep each distinct response once.

    Args:
        pairs: Tokenised pairs, in any order.
        max_length: Tokens of prompt and response together; a longer response is cut at its end, as TRL's
            ``keep_start`` does. None: no limit.
        first: Number of the first pair.

    Returns:
        Groups in the order of their first pair, and what was left out. Pairs are numbered as they stand in the groups.
    """
    groups: dict[tuple[int, ...], Group] = {}
    places: dict[tuple[int, ...], dict[tuple[int, ...], int]] = {}
    skipped = Skipped()
    for pair in pairs:
        prompt = tuple(pair.prompt)
        room = None if max_length is None else max(0, max_length - len(prompt))
        sides = tuple(pair.chosen[:room]), tuple(pair.rejected[:room])
        lacks = {LONG_PROMPT: room == 0, NO_PROMPT: not prompt, EMPTY: not all(sides), IDENTICAL: sides[0] == sides[1]}
        if any(lacks.values()):
            skipped[next(reason for reason in REASONS if lacks[reason])] += 1
            continue
        group = groups.setdefault(prompt, Group(list(prompt)))
        numbers = places.setdefault(prompt, {})
        for side, indices in zip(sides, (group.chosen, group.rejected), strict=True):
            if side not in numbers:
                numbers[side] = len(group.responses)
                group.responses.append(list(side))
            indices.append(numbers[side])
        group.weights.append(pair.weight)
    for group in groups.values():
        group.pair_ids = list(range(first, first + len(group.weights)))
        first += len(group.weights)
    return list(groups.values()), skipped


def split_pairs(group: Group, token_budget: int, layout: Layout) -> list[Group]:
    """Split a group that is larger than the budget into groups of some of its pairs each, with the prompt repeated.

    Pairs are taken in tiles of a few chosen by a few rejected responses, so that a response is repeated as seldom as the
    budget allows. A single pair is never split.
    """
    if layout.positions(group.prompt, group.responses) <= token_budget:
        return [group]
    mean = sum(map(len, group.responses)) / len(group.responses)
    room = (token_budget - len(group.prompt)) / mean if layout.grouped else token_budget / (len(group.prompt) + mean)
    tile = max(1, int(room / 2))
    tiles = [
        {index: rank // tile for rank, index in enumerate(sorted(set(side)))} for side in (group.chosen, group.rejected)
    ]
    order = sorted(range(len(group.weights)), key=lambda p: (tiles[0][group.chosen[p]], tiles[1][group.rejected[p]]))
    parts: list[list[int]] = []
    part_responses: set[int] = set()
    for pair in order:
        sides = {group.chosen[pair], group.rejected[pair]}
        together = [group.responses[index] for index in part_responses | sides]
        if parts and layout.positions(group.prompt, together) <= token_budget:
            parts[-1].append(pair)
            part_responses |= sides
        else:
            parts.append([pair])
            part_responses = sides
    return [group.part(pairs) for pairs in parts]


def widest_row(groups: Sequence[Group], token_budget: int, layout: Layout) -> int:
    """Return the columns of the widest row that training makes of groups."""
    parts = (part for group in groups for part in split_pairs(group, token_budget, layout))
    return max(max(layout.row_lengths(part.prompt, part.responses)) for part in parts)


def split_responses(group: Group, token_budget: int, layout: Layout) -> list[Group]:
    """Split a group's responses, without its pairs, into groups that fit the budget; a single response is never split."""
    parts: list[Group] = []
    for response in group.responses:
        if parts and layout.positions(group.prompt, [*parts[-1].responses, response]) <= token_budget:
            parts[-1].responses.append(response)
        else:
            parts.append(Group(group.prompt, [response]))
    return parts


def micro_batches(groups: Sequence[Group], token_budget: int, layout: Layout | None = None) -> Iterator[list[int]]:
    """Split groups into micro-batches of rows of like length.

    Args:
        groups: Groups of one optimiser step.
        token_budget: Most positions of a micro-batch, padding included; a larger group stands alone.
        layout: How groups become rows; grouped by default.

    Yields:
        Positions in ``groups``; each stands in exactly one micro-batch.
    """
    layout = layout or Layout()
    lengths = [layout.row_lengths(group.prompt, group.responses) for group in groups]
    batch: list[int] = []
    rows = longest = 0
    for place in sorted(range(len(groups)), key=lambda place: -max(lengths[place])):
        if batch and (rows + len(lengths[place])) * longest > token_budget:
            yield batch
            batch, rows = [], 0
        longest = longest if batch else max(lengths[place])
        batch.append(place)
        rows += len(lengths[place])
    if batch:
        yield batch


@dataclass
class Batch:
    """A collated batch: packed micro-batches, and the tokens of both sides of all pairs, which TRL counts."""

    rows: list[PackedRows]
    tokens: int

    @property
    def pairs(self) -> int:
        """Number of pairs."""
        return sum(len(rows.weights) for rows in self.rows)


def collate(examples: Sequence[Mapping[str, Any]], token_budget: int, layout: Layout) -> dict[str, Batch]:
    """Pack dataset rows into micro-batches of at most ``token_budget`` positions, in a dict as transformers expects."""
    groups = [part for row in examples for part in split_pairs(to_group(row), token_budget, layout)]
    batches = micro_batches(groups, token_budget, layout)
    rows = [pack([groups[place] for place in places], layout) for places in batches]
    sides = [(group, index) for group in groups for index in (*group.chosen, *group.rejected)]
    return {"batch": Batch(rows, sum(len(group.prompt) + len(group.responses[index]) for group, index in sides))}


def to_group(example: Mapping[str, Any]) -> Group:
    """Return a dataset row as a group."""
    columns = {field: example[name] for name, field in GROUP_COLUMNS.items()}
    return Group(**columns, reference=example.get("reference", []))


def refuse_images(dataset: Any, name: str) -> None:
    """Refuse a dataset of which only the texts would be trained."""
    if {"image", "images"} & set(getattr(dataset, "column_names", None) or ()):
        raise PersodpoError(f"The {name} dataset has images, which rows of ours leave out; use TRL's DPOTrainer.")


def unformatted(dataset: Any, name: str) -> Dataset:
    """Return a dataset as plain Python values of what its format shows: columns left out, transforms applied.

    Raises:
        PersodpoError: It is a stream, has images, or was grouped already.
    """
    refuse_images(dataset, name)
    if isinstance(dataset, IterableDataset):
        raise PersodpoError(f"The {name} dataset is a stream; grouping needs all pairs of a prompt at hand.")
    if set(GROUP_COLUMNS) <= set(dataset.column_names):
        raise PersodpoError(f"The {name} dataset is grouped already; pass the pairs themselves.")
    columns = dataset.format["columns"]
    if dataset.format["type"] == "custom":
        dataset = dataset.map(dict)
    plain: Dataset = dataset.with_format(None)
    return plain if set(columns) == set(plain.column_names) else plain.select_columns(columns)


def check_scores(dataset: Dataset, dataset_name: str) -> None:
    """Refuse a dataset without scores, or with one that is not a number.

    Raises:
        PersodpoError: It is so.
    """
    if not set(SCORES) <= set(dataset.column_names):
        raise PersodpoError(f"weighting needs the columns {' and '.join(SCORES)} in the {dataset_name} dataset.")
    for name in SCORES:
        for row, score in enumerate(dataset[name]):
            if not isinstance(score, int | float) or not math.isfinite(score):
                raise PersodpoError(
                    f"{name} of row {row} of the {dataset_name} dataset is {score!r}; every pair needs a number."
                )


def token_pairs(dataset: Dataset, weighting: Weighting) -> list[TokenPair]:
    """Attach its weight to each tokenised pair."""
    weights = torch.ones(len(dataset))
    if weighting != "none":
        chosen, rejected = (torch.tensor(dataset[name], dtype=torch.float64) for name in SCORES)
        weights = pair_weights(chosen, rejected, weighting)
    columns = (*(dataset[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")), weights.tolist())
    return [TokenPair(*row) for row in zip(*columns, strict=True)]


def without_filling(ids: NDArray[np.int64], dataset: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    """Return which evaluated pairs count: each as often as the dataset holds it.

    Several processes fill the last batch up with rows that were evaluated before.

    Args:
        ids: Number of each evaluated pair.
        dataset: Numbers of the pairs of each row.
    """
    numbers, counts = np.unique(np.concatenate([np.asarray(row) for row in dataset]), return_counts=True)
    order = np.argsort(ids, kind="stable")
    ranks = np.arange(len(ids)) - np.searchsorted(ids[order], ids[order])
    return order[ranks < counts[np.searchsorted(numbers, ids[order])]]
