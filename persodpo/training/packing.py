"""Tokenised pairs in, packed rows out: one row a prompt, each of its distinct responses once.

A row is laid out as ``[P1 .. Pn-1 | Pn r1 | Pn r2 | ...]``. The last prompt token stands again at the head of each
branch, so that every position of a branch has exactly one label: the response's next token. Branch positions restart at
n - 1, and the mask lets a branch see the prompt and itself. A response's log-probability is then what a forward pass over
prompt and response alone gives, whatever else stands in the row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from persodpo.errors import PersodpoError

IGNORE = -100
_PADDING = -1


@dataclass
class Group:
    """A prompt, its distinct responses, and its pairs.

    Attributes:
        prompt: Token ids, at least one.
        responses: Token ids of each distinct response, at least one token each.
        chosen: Index into ``responses`` of each pair's chosen side.
        rejected: Index of its rejected side.
        weights: Weight of each pair's loss.
        offsets: Offset of each pair's logit.
    """

    prompt: list[int]
    responses: list[list[int]] = field(default_factory=list)
    chosen: list[int] = field(default_factory=list)
    rejected: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    offsets: list[float] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Positions of the group's row."""
        return len(self.prompt) - 1 + sum(len(response) for response in self.responses)


@dataclass(frozen=True)
class Skipped:
    """Pairs that were left out, by reason.

    Attributes:
        long_prompt: The prompt fills the whole length limit.
        empty: A side has no token.
        identical: Both sides are the same tokens (after truncation).
    """

    long_prompt: int = 0
    empty: int = 0
    identical: int = 0

    def __str__(self) -> str:
        """Say what was left out and why."""
        parts = {
            "prompt as long as max_length": self.long_prompt,
            "empty response": self.empty,
            "chosen equals rejected": self.identical,
        }
        named = ", ".join(f"{count} ({reason})" for reason, count in parts.items() if count)
        return f"left out pairs: {named or 'none'}"


@dataclass(frozen=True)
class TokenPair:
    """A tokenised pair.

    Attributes:
        prompt: Token ids of the prompt.
        chosen: Token ids of the chosen response, end of sequence included.
        rejected: Token ids of the rejected response.
        weight: Weight of its loss.
        offset: Offset of its logit.
    """

    prompt: Sequence[int]
    chosen: Sequence[int]
    rejected: Sequence[int]
    weight: float = 1.0
    offset: float = 0.0


def group_pairs(pairs: Sequence[TokenPair], max_length: int | None) -> tuple[list[Group], Skipped]:
    """Group pairs by prompt and keep each distinct response once.

    Args:
        pairs: Tokenised pairs, in any order.
        max_length: Tokens of prompt and response together; a longer response is cut at its end, as TRL's
            ``keep_start`` does. None: no limit.

    Returns:
        Groups in the order of their first pair, and what was left out.

    Raises:
        PersodpoError: A prompt has no token.
    """
    groups: dict[tuple[int, ...], Group] = {}
    places: dict[tuple[int, ...], dict[tuple[int, ...], int]] = {}
    long_prompt = empty = identical = 0
    for number, pair in enumerate(pairs):
        prompt = tuple(pair.prompt)
        if not prompt:
            raise PersodpoError(f"Pair {number} has a prompt without tokens; every prompt needs at least one.")
        room = None if max_length is None else max_length - len(prompt)
        if room is not None and room <= 0:
            long_prompt += 1
            continue
        chosen, rejected = tuple(pair.chosen[:room]), tuple(pair.rejected[:room])
        if not chosen or not rejected:
            empty += 1
            continue
        if chosen == rejected:
            identical += 1
            continue
        group = groups.setdefault(prompt, Group(list(prompt)))
        known = places.setdefault(prompt, {})
        for side, indices in ((chosen, group.chosen), (rejected, group.rejected)):
            if side not in known:
                known[side] = len(group.responses)
                group.responses.append(list(side))
            indices.append(known[side])
        group.weights.append(pair.weight)
        group.offsets.append(pair.offset)
    return list(groups.values()), Skipped(long_prompt, empty, identical)


def micro_batches(groups: Sequence[Group], token_budget: int) -> Iterator[list[int]]:
    """Split groups into micro-batches of rows of like length.

    Args:
        groups: Groups of one optimiser step.
        token_budget: Most positions of a micro-batch, padding included; a longer row stands alone.

    Yields:
        Positions in ``groups``; each stands in exactly one micro-batch.
    """
    order = sorted(range(len(groups)), key=lambda place: -groups[place].tokens)
    start = 0
    while start < len(order):
        rows = max(1, token_budget // max(1, groups[order[start]].tokens))
        yield order[start : start + rows]
        start += rows


@dataclass(frozen=True)
class PackedRows:
    """Groups as tensors; rows are padded at their end.

    Attributes:
        input_ids: [rows, length].
        position_ids: [rows, length].
        attention_mask: True where a query (third axis) may see a key (fourth), [rows, 1, length, length].
        labels: The response token that follows each position, `IGNORE` elsewhere, [rows, length].
        owner: Response number within the micro-batch of each position, -1 elsewhere, [rows, length].
        lengths: Tokens of each response, [responses].
        chosen: Response number of each pair's chosen side, [pairs].
        rejected: Response number of its rejected side, [pairs].
        weights: [pairs].
        offsets: [pairs].
        shared: Positions at the start of every row that stand in its prompt, so that plain causal attention holds there.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    owner: Tensor
    lengths: Tensor
    chosen: Tensor
    rejected: Tensor
    weights: Tensor
    offsets: Tensor
    shared: int

    def to(self, device: torch.device) -> PackedRows:
        """Return the rows on a device."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "shared"}
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
        return PackedRows(**moved, shared=self.shared)


def pack(groups: Sequence[Group], pad_token_id: int = 0) -> PackedRows:
    """Lay groups out as rows.

    Args:
        groups: One a row.
        pad_token_id: Fills rows to the longest.

    Returns:
        The rows; responses are numbered through all of them, in order.
    """
    length = max(group.tokens for group in groups)
    shape = (len(groups), length)
    input_ids = torch.full(shape, pad_token_id)
    position_ids = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORE)
    branch = torch.full(shape, _PADDING)
    owner = torch.full(shape, -1)
    first, bases = 0, []
    for row, group in enumerate(groups):
        bases.append(first)
        shared = len(group.prompt) - 1
        input_ids[row, :shared] = torch.tensor(group.prompt[:-1], dtype=torch.long)
        position_ids[row, :shared] = torch.arange(shared)
        branch[row, :shared] = 0
        start = shared
        for number, response in enumerate(group.responses):
            end = start + len(response)
            input_ids[row, start:end] = torch.tensor([group.prompt[-1], *response[:-1]])
            position_ids[row, start:end] = torch.arange(shared, shared + len(response))
            labels[row, start:end] = torch.tensor(response)
            branch[row, start:end] = number + 1
            owner[row, start:end] = first + number
            start = end
        first += len(group.responses)
    return PackedRows(
        input_ids,
        position_ids,
        tree_mask(branch),
        labels,
        owner,
        torch.tensor([len(response) for group in groups for response in group.responses]),
        torch.tensor([base + index for base, group in zip(bases, groups, strict=True) for index in group.chosen]),
        torch.tensor([base + index for base, group in zip(bases, groups, strict=True) for index in group.rejected]),
        torch.tensor([weight for group in groups for weight in group.weights]),
        torch.tensor([offset for group in groups for offset in group.offsets]),
        min(len(group.prompt) - 1 for group in groups),
    )


def tree_mask(branch: Tensor) -> Tensor:
    """Return who may see whom: what stands before, in the prompt or in the same branch.

    Args:
        branch: 0 in the prompt, 1, 2, ... in its branches, -1 in padding, [rows, length].

    Returns:
        Boolean mask, [rows, 1, length, length]. Padding sees itself, so that no row of the softmax is empty.
    """
    length = branch.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=branch.device).tril()
    query, key = branch[:, :, None], branch[:, None, :]
    seen = causal & ((key == 0) | (key == query)) & (key != _PADDING) & (query != _PADDING)
    return (seen | torch.eye(length, dtype=torch.bool, device=branch.device))[:, None]
