"""Tokenised pairs in, packed rows out: one row per prompt, each of its distinct responses once.

A row is laid out as ``[P1 .. Pn-1 | Pn r1 | Pn r2 | ...]``. The last prompt token stands again at the head of each branch,
so that every position of a branch has exactly one label: the response's next token. Branch positions restart at n - 1,
and the mask lets a branch see the prompt and itself. A response's log-probability is then what a forward pass over prompt
and response alone gives, whatever else stands in the row. Where a model cannot be given such a row, the layout has one
response per row, which is an ordinary causal sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property

import torch
from torch import Tensor

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
        pair_ids: Number of each pair in its dataset.
        reference: Log-probability of each response under the reference, in nats.
    """

    prompt: list[int]
    responses: list[list[int]] = field(default_factory=list)
    chosen: list[int] = field(default_factory=list)
    rejected: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    pair_ids: list[int] = field(default_factory=list)
    reference: list[float] = field(default_factory=list)

    def part(self, pairs: Sequence[int]) -> Group:
        """Return the group of some of the pairs, with their responses alone."""
        responses = sorted({side[pair] for pair in pairs for side in (self.chosen, self.rejected)})
        place = {index: number for number, index in enumerate(responses)}
        return Group(
            self.prompt,
            [self.responses[index] for index in responses],
            [place[self.chosen[pair]] for pair in pairs],
            [place[self.rejected[pair]] for pair in pairs],
            [self.weights[pair] for pair in pairs],
            [self.pair_ids[pair] for pair in pairs],
            [self.reference[index] for index in responses if self.reference],
        )


@dataclass(frozen=True)
class Layout:
    """How groups become rows.

    Attributes:
        grouped: All responses of a prompt in one row, or one response per row.
        closed: Also compute the last token of each response, which has no label; the auxiliary loss of
            mixture-of-experts models counts it.
        multiple_of: Rows are padded to a multiple of this.
        pad_token_id: Fills rows.
    """

    grouped: bool = True
    closed: bool = False
    multiple_of: int = 1
    pad_token_id: int = 0

    def row_lengths(self, prompt: Sequence[int], responses: Sequence[Sequence[int]]) -> list[int]:
        """Return the positions of each row of a group."""
        branches = [len(response) + self.closed for response in responses]
        shared = len(prompt) - 1
        lengths = [shared + sum(branches)] if self.grouped else [shared + branch for branch in branches]
        return [-(-length // self.multiple_of) * self.multiple_of for length in lengths]

    def positions(self, prompt: Sequence[int], responses: Sequence[Sequence[int]]) -> int:
        """Return the positions that a group fills when it stands alone, padding included."""
        lengths = self.row_lengths(prompt, responses)
        return len(lengths) * max(lengths)


@dataclass(frozen=True)
class PackedRows:
    """Groups as tensors; rows are padded at their end.

    Attributes:
        input_ids: [rows, length].
        position_ids: [rows, length].
        branch: 0 in the prompt, 1, 2, ... in its branches, -1 in padding, [rows, length].
        labels: The response token that follows each position, `IGNORE` elsewhere, [rows, length].
        owner: Response number within the micro-batch of each position that has a label, -1 elsewhere, [rows, length].
        sides: Pair sides whose sequence holds each position, so that counts over positions are those over the sequences
            of all pairs, [rows, length].
        lengths: Tokens of each response, [responses].
        reference: Log-probability of each response under the reference, in nats, [responses]; empty where not known.
        chosen: Response number of each pair's chosen side, [pairs].
        rejected: Response number of its rejected side, [pairs].
        weights: [pairs].
        pair_ids: [pairs].
        shared: Positions at the start of every row that stand in its prompt, so that plain causal attention holds there.
        grouped: Whether rows hold all responses of a prompt.
    """

    input_ids: Tensor
    position_ids: Tensor
    branch: Tensor
    labels: Tensor
    owner: Tensor
    sides: Tensor
    lengths: Tensor
    reference: Tensor
    chosen: Tensor
    rejected: Tensor
    weights: Tensor
    pair_ids: Tensor
    shared: int
    grouped: bool

    def to(self, device: torch.device | str) -> PackedRows:
        """Return the rows on a device."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        on_device = {
            name: value.to(device, non_blocking=True) for name, value in values.items() if isinstance(value, Tensor)
        }
        return PackedRows(**values | on_device)

    @cached_property
    def attention_mask(self) -> Tensor:
        """True where a query (third axis) may see a key (fourth), [rows, 1, length, length]."""
        return tree_mask(self.branch)

    @cached_property
    def _masks(self) -> dict[tuple[int | None, torch.dtype | None], Tensor]:
        return {}

    def mask(self, window: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Return the attention mask of a kind of layer, made once for all layers of the kind.

        Args:
            window: Keys are seen whose position is less than this behind the query's; None for all.
            dtype: For a mask that is added to attention scores, with this type's least number where nothing may be seen;
                None for a boolean mask.

        Returns:
            The mask, [rows, 1, length, length].
        """
        if (window, dtype) not in self._masks:
            visible = self.attention_mask
            if window is not None:
                behind = self.position_ids[:, None, :, None] - self.position_ids[:, None, None, :]
                visible = visible & (behind < window)
            if dtype is not None:
                visible = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(
                    ~visible, torch.finfo(dtype).min
                )
            self._masks[window, dtype] = visible
        return self._masks[window, dtype]


def pack(groups: Sequence[Group], layout: Layout | None = None) -> PackedRows:
    """Lay groups out as rows.

    Args:
        groups: The groups of a micro-batch.
        layout: How; grouped by default.

    Returns:
        The rows; responses are numbered through all groups, in order.
    """
    layout = layout or Layout()
    rows = [
        (group.prompt, branches)
        for group in groups
        for branches in ([group.responses] if layout.grouped else [[response] for response in group.responses])
    ]
    length = max(max(layout.row_lengths(group.prompt, group.responses)) for group in groups)
    shape = (len(rows), length)
    bases = _bases(groups)
    counts = _sides_of_responses(groups, bases)
    input_ids, labels = torch.full(shape, layout.pad_token_id), torch.full(shape, IGNORE)
    position_ids, sides = torch.zeros(shape, dtype=torch.long), torch.zeros(shape)
    branch, owner = torch.full(shape, _PADDING), torch.full(shape, -1)
    number = 0
    for row, (prompt, responses) in enumerate(rows):
        shared = len(prompt) - 1
        input_ids[row, :shared] = torch.tensor(prompt[:-1], dtype=torch.long)
        position_ids[row, :shared] = torch.arange(shared)
        branch[row, :shared] = 0
        sides[row, :shared] = counts[number : number + len(responses)].sum()
        start = shared
        for response in responses:
            end = start + len(response)
            closed = end + layout.closed
            input_ids[row, start:closed] = torch.tensor([prompt[-1], *response][: closed - start])
            position_ids[row, start:closed] = torch.arange(shared, shared + closed - start)
            labels[row, start:end] = torch.tensor(response)
            branch[row, start:closed] = int(branch[row, start - 1]) + 1 if start else 1
            owner[row, start:end] = number
            sides[row, start:closed] = counts[number]
            start, number = closed, number + 1
    return PackedRows(
        input_ids, position_ids, branch, labels, owner, sides,
        torch.tensor([len(response) for group in groups for response in group.responses]),
        torch.tensor([value for group in groups for value in group.reference], dtype=torch.float32),
        torch.tensor([base + index for base, group in zip(bases, groups, strict=True) for index in group.chosen]),
        torch.tensor([base + index for base, group in zip(bases, groups, strict=True) for index in group.rejected]),
        torch.tensor([weight for group in groups for weight in group.weights]),
        torch.tensor([pair for group in groups for pair in group.pair_ids]),
        min(len(group.prompt) - 1 for group in groups), layout.grouped,
    )  # fmt: skip


def _bases(groups: Sequence[Group]) -> list[int]:
    """Return the number of each group's first response."""
    bases = [0]
    for group in groups:
        bases.append(bases[-1] + len(group.responses))
    return bases[:-1]


def _sides_of_responses(groups: Sequence[Group], bases: Sequence[int]) -> Tensor:
    """Return how many sides of pairs each response is."""
    counts = torch.zeros(sum(len(group.responses) for group in groups))
    for base, group in zip(bases, groups, strict=True):
        for index in (*group.chosen, *group.rejected):
            counts[base + index] += 1
    return counts


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
    visible = causal & ((key == 0) | (key == query)) & (key != _PADDING) & (query != _PADDING)
    return (visible | torch.eye(length, dtype=torch.bool, device=branch.device))[:, None]
