"""Grouping and packing: plain forward passes, layouts by hand, and pairs that come back whole. Losses: `test_trainer.py`."""

from __future__ import annotations

import copy
import math
import random
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import plain_log_probs, tiny_model
from transformers import Qwen2ForCausalLM

from persodpo.errors import PersodpoError
from persodpo.training.forward import CHUNK, PACKED_ATTENTION, install_packed_forward, response_log_probs
from persodpo.training.groups import (
    EMPTY,
    IDENTICAL,
    LONG_PROMPT,
    NO_PROMPT,
    TokenPair,
    group_pairs,
    micro_batches,
    split_pairs,
    split_responses,
)
from persodpo.training.loss import LossSettings, pair_weights
from persodpo.training.packing import IGNORE, Group, Layout, pack

VOCABULARY = 97


@pytest.fixture(scope="module")
def model() -> Qwen2ForCausalLM:
    return tiny_model(vocab_size=VOCABULARY, tie_word_embeddings=True, initializer_range=0.3).eval()


TOKENS = st.integers(0, VOCABULARY - 1)
RESPONSES = st.lists(st.lists(TOKENS, min_size=1, max_size=9), min_size=1, max_size=5)
GROUPS = st.lists(st.builds(Group, st.lists(TOKENS, min_size=1, max_size=12), RESPONSES), min_size=1, max_size=3)


@settings(max_examples=20)
@given(GROUPS, st.booleans(), st.sampled_from([3, CHUNK]))
def test_packed_values_and_gradients_are_those_of_plain_forward_passes(model, groups, checkpointing, chunk):
    """Rows of any lengths; attention with a mask everywhere, and without one in the prompts; logits in pieces."""
    other = copy.deepcopy(model)
    install_packed_forward(other)
    assert (model.config._attn_implementation, other.config._attn_implementation) == ("sdpa", PACKED_ATTENTION["sdpa"])
    if checkpointing:
        other.train()
        other.gradient_checkpointing_enable()
    rows = pack(groups)
    factors = torch.linspace(-1, 1, len(rows.lengths))
    found = []
    for part, compute in (
        (model, lambda: torch.cat([plain_log_probs(model, group) for group in groups])),
        (model, lambda: response_log_probs(model, rows)),
        (other, lambda: other(packed=rows)),
    ):
        part.zero_grad()
        with patch("persodpo.training.forward.CHUNK", chunk):
            values = compute()
            (values * factors).sum().backward()
        found.append((values.detach(), [parameter.grad for parameter in part.parameters()]))
    for values, gradients in found[1:]:
        assert torch.allclose(values, found[0][0], atol=1e-4)
        for mine, theirs in zip(gradients, found[0][1], strict=True):
            assert torch.allclose(mine, theirs, atol=1e-3, rtol=1e-3)


def test_a_model_with_a_packed_forward_generates_and_saves_as_before(model, tmp_path):
    other = copy.deepcopy(model)
    install_packed_forward(other)
    ids = torch.tensor([[5, 6, 7], [0, 8, 9]])
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    arguments = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(other.generate(ids, **arguments), model.generate(ids, **arguments))
    other.save_pretrained(tmp_path)
    assert PACKED_ATTENTION["sdpa"] not in (tmp_path / "config.json").read_text()


def test_layout_by_hand():
    rows = pack([Group([1, 2, 3], [[4, 5], [6]])])
    assert rows.input_ids.tolist() == [[1, 2, 3, 4, 3]]
    assert rows.position_ids.tolist() == [[0, 1, 2, 3, 2]]
    assert rows.labels.tolist() == [[IGNORE, IGNORE, 4, 5, 6]]
    assert rows.owner.tolist() == [[-1, -1, 0, 0, 1]]
    assert rows.attention_mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 1],
    ]  # fmt: skip
    # A window of 2 over positions: the second branch is far from the prompt in its row, not in position.
    assert rows.mask(2)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 1, 0, 0, 1],
    ]  # fmt: skip
    added = rows.mask(None, torch.float32)
    assert torch.equal(added == 0, rows.mask())
    assert added.min() == torch.finfo(torch.float32).min


PAIRS = st.lists(
    st.builds(
        TokenPair, *[st.lists(st.integers(0, 2), min_size=low, max_size=4) for low in (1, 0, 0)], st.floats(0, 2)
    ),
    max_size=20,
)


@given(PAIRS, st.one_of(st.none(), st.integers(1, 6)))
def test_grouping_loses_no_pair(pairs, limit):
    groups, skipped = group_pairs(pairs, limit)
    seen = [
        (tuple(g.prompt), tuple(g.responses[c]), tuple(g.responses[r]), w)
        for g in groups
        for c, r, w in zip(g.chosen, g.rejected, g.weights, strict=True)
    ]
    expected, counts = [], [0, 0, 0]
    for pair in pairs:
        room = None if limit is None else max(0, limit - len(pair.prompt))
        chosen, rejected = tuple(pair.chosen[:room]), tuple(pair.rejected[:room])
        if room == 0:
            counts[0] += 1
        elif not chosen or not rejected:
            counts[1] += 1
        elif chosen == rejected:
            counts[2] += 1
        else:
            expected.append((tuple(pair.prompt), chosen, rejected, pair.weight))
    assert sorted(seen) == sorted(expected)
    assert [skipped[reason] for reason in (LONG_PROMPT, EMPTY, IDENTICAL)] == counts
    for group in groups:
        assert len({tuple(response) for response in group.responses}) == len(group.responses)
        assert set(group.chosen) | set(group.rejected) == set(range(len(group.responses)))
    assert len({tuple(group.prompt) for group in groups}) == len(groups)


def test_a_prompt_without_tokens_is_left_out():
    groups, skipped = group_pairs([TokenPair([], [1], [2]), TokenPair([3], [1], [2])], None)
    assert ([group.prompt for group in groups], skipped[NO_PROMPT]) == ([[3]], 1)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 120))
def test_micro_batches_cover_every_group_once_within_budget(lengths, budget):
    groups = [Group([1], [[2] * length]) for length in lengths]
    batches = list(micro_batches(groups, budget))
    assert sorted(place for batch in batches for place in batch) == list(range(len(groups)))
    for batch in batches:
        longest = max(len(groups[place].responses[0]) for place in batch)
        assert longest * len(batch) <= budget or len(batch) == 1


def test_weights_by_hand():
    chosen, rejected = torch.tensor([0.9, 0.7, 0.7]), torch.tensor([0.1, 0.5, 0.7])
    sigmoid = pair_weights(chosen, rejected, "sigmoid")
    assert sigmoid.tolist() == pytest.approx([1 / (1 + math.exp(-m)) for m in (0.8, 0.2, 0.0)])
    assert pair_weights(chosen, rejected, "none").tolist() == [1, 1, 1]


@pytest.mark.parametrize("arguments", [{"loss_type": "sigmiod"}, {"loss_type": "robust", "label_smoothing": 0.5}])
def test_losses_that_cannot_be_are_refused(arguments):
    with pytest.raises(PersodpoError):
        LossSettings(**arguments)


def test_layout_with_one_response_per_row_by_hand():
    rows = pack(
        [Group([1, 2, 3], [[4, 5], [6]], [0], [1], [1.0], [7])], Layout(grouped=False, multiple_of=4, pad_token_id=9)
    )
    assert rows.input_ids.tolist() == [[1, 2, 3, 4], [1, 2, 3, 9]]
    assert rows.labels.tolist() == [[IGNORE, IGNORE, 4, 5], [IGNORE, IGNORE, 6, IGNORE]]
    assert rows.owner.tolist() == [[-1, -1, 0, 0], [-1, -1, 1, -1]]
    assert (rows.chosen.tolist(), rows.rejected.tolist(), rows.pair_ids.tolist()) == ([0], [1], [7])


def test_closed_rows_count_every_token_of_every_side_once():
    """What an auxiliary loss counts: the tokens of all sides of pairs, prompt repeated."""
    group = Group([1, 2, 3], [[4, 5], [6]], [0, 0], [1, 1], [1.0, 1.0], [0, 1])
    for grouped in (True, False):
        rows = pack([group, Group([1], [[2], [3]], [0], [1], [1.0], [2])], Layout(grouped=grouped, closed=True))
        counts = torch.zeros(7).index_add(0, rows.input_ids.flatten(), rows.sides.flatten())
        assert counts.tolist() == [0, 6, 5, 5, 2, 2, 2]
        assert (rows.labels != IGNORE).sum() == 5


@given(st.integers(1, 9), st.integers(1, 9), st.integers(10, 60), st.booleans(), st.integers(0, 99))
def test_a_large_group_is_split_without_losing_a_pair(chosen, rejected, budget, grouped, seed):
    source = random.Random(seed)
    responses = [[source.randint(1, 9)] * source.randint(1, 8) for _ in range(chosen + rejected)]
    sides = [(c, chosen + r) for c in range(chosen) for r in range(rejected)]
    pairs = len(sides)
    group = Group(
        [1, 2, 3], responses, *map(list, zip(*sides, strict=True)), [float(n) for n in range(pairs)], list(range(pairs)),
        [float(n) for n in range(len(responses))],
    )  # fmt: skip
    layout = Layout(grouped=grouped)
    parts = split_pairs(group, budget, layout)
    assert sorted(pair for part in parts for pair in part.pair_ids) == list(range(pairs))
    for part in parts:
        assert layout.positions(part.prompt, part.responses) <= budget or len(part.pair_ids) == 1
        for number, pair in enumerate(part.pair_ids):
            ends = (part.chosen[number], part.rejected[number])
            assert [part.responses[end] for end in ends] == [responses[end] for end in sides[pair]]
            assert [part.reference[end] for end in ends] == list(map(float, sides[pair]))
            assert part.weights[number] == pair
    alone = split_responses(group, budget, layout)
    assert [response for part in alone for response in part.responses] == responses
    assert all(layout.positions(p.prompt, p.responses) <= budget or len(p.responses) == 1 for p in alone)


def test_four_hundred_pairs_of_one_prompt_stay_under_the_budget():
    sides = [(c, 20 + r) for c in range(20) for r in range(20)]
    group = Group([1] * 300, [[2 + n] * 100 for n in range(40)], *map(list, zip(*sides, strict=True)), [1.0] * 400,
                  list(range(400)), [0.0] * 40)  # fmt: skip
    parts = split_pairs(group, 1024, Layout())
    assert max(pack([part]).input_ids.numel() for part in parts) <= 1024
    # Pair by pair there would be 400 rows of 500 positions.
    assert sum(pack([part]).input_ids.numel() for part in parts) < 400 * 500 / 4
