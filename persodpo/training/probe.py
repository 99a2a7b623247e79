"""The random texts on which the guard compares packed rows with plain passes, and those passes.

Texts are as long as training makes them; a model is put back after the passes as it was before.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from persodpo.errors import PersodpoError
from persodpo.training.forward import base_model, layout_of, text_config
from persodpo.training.packing import Group, Layout, pack

#: Nats per token that rounding may explain, by the type of the weights.
ROUNDING = {torch.float64: 2e-6, torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.2}
#: Share of it by which a response may move others of its row beyond what those of another row do.
LEAK = 1e-3
#: What a packed pass through an architecture that cannot be packed may raise.
FAULTS = (
    TypeError, ValueError, RuntimeError, KeyError, AttributeError, IndexError, NotImplementedError, AssertionError,
)  # fmt: skip
#: Standard deviation of the noise that weights get for the random group, and about how many elements of each are moved.
NOISE, SMALL = 0.02, 2**20
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
        lengths = {
            int(value) for name, value in values
            if isinstance(value, int | float) and value == value // 1 and any(part in name for part in LENGTHS)
        }  # fmt: skip
        windows.extend([*lengths, *(one * other for one, other in itertools.combinations(lengths, 2))])
    return max(window for window in windows if window < limit)


def random_groups(
    model: Any, max_length: int | None, token_budget: int, widest: int | None = None
) -> tuple[list[Group], Group]:
    """Return a group longer than the model's windows with shorter ones beside it, and the first filled up to a wide row.

    Arguments as `persodpo.training.guard.check_packing`.
    """
    config = text_config(model)
    positions = getattr(config, "max_position_embeddings", None) or token_budget
    # RoBERTa's positions begin after that of the padding, and an index beyond the table ends a GPU's process.
    padding = getattr(config, "pad_token_id", None)
    most = positions - (1 + padding if isinstance(padding, int) and 0 <= padding <= 2 else 0)
    rope = getattr(config, "rope_parameters", None)
    # A model with rope goes on beyond its positions, with other angles under some; others cannot go there.
    longest = (max_length or positions + token_budget) if rope else min(max_length or most, most)
    row = widest or token_budget
    limit = max(longest, row)
    changing = positions if "dynamic" in str(rope) or "longrope" in str(rope) else 0
    window = max(longest_window(model, limit), changing if changing < limit else 0)
    room = int(max(2, min(longest, max(window + sum(RESPONSES), WHOLE))))
    lengths = [min(length, max(1, room // 2)) for length in RESPONSES]
    prompt = max(1, room - max(lengths))
    source = torch.Generator().manual_seed(0)
    ids = plain_ids(model)

    def draw(count: int) -> list[int]:
        return ids[torch.randint(len(ids), (count,), generator=source)].tolist()

    responses = [draw(length) for length in lengths]
    # A response that begins as another shows a leak most clearly in a model that has learned to repeat.
    responses[2][: min(lengths)] = responses[0][: min(lengths)]
    short = [Group(draw(count), responses) for count in (max(1, min(prompt // 2, PROMPT)), 1)]
    # A window or a table of columns that no sequence reaches may still be shorter than a row: fill it up in the middle.
    wide = widest or min(token_budget, max(window + sum(RESPONSES), WHOLE))
    lacking, each = wide - (prompt - 1) - sum(lengths), max(1, room - prompt)
    filler = [draw(min(each, lacking - start)) for start in range(0, lacking, each)]
    first, start = responses[0].copy(), draw(prompt)
    # Texts of chats have ends inside, and pads where these are ends; a model may see no further back than to the last one.
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    ends = dict.fromkeys(end for name in names for end in _as_list(getattr(config, name, None)))
    for tokens in (start, first):
        inside = [end for end in ends if 0 <= end < config.vocab_size]
        for place, end in zip(range(len(tokens) // 2, len(tokens)), inside, strict=False):
            tokens[place] = end
    return [Group(start, [first, *responses[1:]]), *short], Group(start, [first, *filler, *responses[1:]])


def _as_list(value: Any) -> list[int]:
    return value if isinstance(value, list) else [value] if isinstance(value, int) else []


def plain_ids(model: Any) -> Tensor:
    """Return the token ids that stand for nothing but text, as far as the configs tell; all where none does."""
    config = text_config(model)
    special: set[int] = set()
    for owner in (base_model(model).config, config):
        for name, value in vars(owner).items():
            if name.endswith(("token_id", "token_index")):
                special.update(_as_list(value))
    every = range(config.vocab_size)
    return torch.tensor([number for number in every if number not in special] or every)


def _compared(group: Group) -> list[list[int]]:
    """Return the responses that are compared: the first and the last two; between them stands what fills a row."""
    return [group.responses[0], *group.responses[-2:]]


def plain_log_probs(model: Any, group: Group) -> Tensor:
    """Run one forward pass over prompt and response alone for each response; nats per token."""
    means = []
    for response in _compared(group):
        ids = torch.tensor([group.prompt + response], device=model.device)
        # Given as TRL gives it: some models take a token of the text for padding where no mask tells them otherwise.
        mask = torch.ones_like(ids)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0, len(group.prompt) - 1 : -1]
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        means.append(torch.log_softmax(wide, -1).gather(-1, ids[0, len(group.prompt) :, None]).mean())
    return torch.stack(means)


def packed_log_probs(model: Any, groups: list[Group], *, grouped: bool) -> Tensor:
    """Return the log-probabilities of the compared responses, nats per token."""
    values = model(packed=pack(groups, Layout(grouped=grouped)).to(model.device))
    parts = torch.split(values, [len(group.responses) for group in groups])
    lengths = torch.tensor([len(response) for group in groups for response in _compared(group)], device=values.device)
    return torch.cat([part[[0, -2, -1]] for part in parts]) / lengths


def precision(model: Any) -> torch.dtype:
    """Return the coarsest type that a model computes in."""
    halves = {tensor.dtype for tensor in (*model.parameters(), *model.buffers())} & {torch.float16, torch.bfloat16}
    packed = any(getattr(model, f"is_loaded_in_{bits}bit", False) for bits in (4, 8))
    if packed or torch.bfloat16 in halves:
        return torch.bfloat16
    if halves or (model.device.type == "cuda" and model.dtype == torch.float32 and _tf32()):
        return torch.float16
    return torch.float64 if model.dtype == torch.float64 else torch.float32


def _tf32() -> bool:
    try:
        return bool(torch.backends.cuda.matmul.allow_tf32)
    except RuntimeError:  # set by torch's newer names
        return True


def first_line(error: Exception) -> str:
    """Return the first line of what an error says."""
    return (str(error).strip().splitlines() or [""])[0][:160]


def moved_by_others(model: Any, groups: list[Group], packed: Tensor, *, grouped: bool) -> tuple[float, float]:
    """Return how far other tokens in a response move the rest of its row, and those in other rows; nats per token.

    Right rows move by nothing, or no more than by other rows: experts compute tokens together, so that even other rows
    move by rounding.
    """
    *rest, last = (replace(group, responses=_other_first(group)) for group in groups)
    in_row, in_others = (
        float((packed_log_probs(model, altered, grouped=grouped) - packed)[-2:].abs().max())
        for altered in ([*groups[:-1], last], [*rest, groups[-1]])
    )
    return in_row, in_others


def _other_first(group: Group) -> list[list[int]]:
    """Return the responses with other tokens in the first."""
    first, last = group.responses[0], group.responses[-1][::-1]
    return [(last * len(first))[: len(first)], *group.responses[1:]]


@contextmanager
def refusing_switches(model: Any) -> Iterator[None]:
    """Refuse a model that puts other modules in place of its own or changes an attribute that is a text; put them back.

    BigBird takes full attention for good once it has read a short text.
    """

    def parts(module: nn.Module) -> dict[str, Any]:
        texts = {name: value for name, value in vars(module).items() if isinstance(value, str)}
        texts.pop("packed_attention", None)  # is set by `install_packed_forward`
        return texts | dict(module._modules)

    before = [(module, parts(module)) for module in model.modules()]
    names: list[str] = []
    try:
        yield
    finally:
        for module, parts_before in before:
            now = parts(module)
            names += [
                name for name, value in parts_before.items() if now.get(name) is not value and now.get(name) != value
            ]
            for name, value in parts_before.items():
                (vars(module) if isinstance(value, str) else module._modules)[name] = value
    if names:
        raise PersodpoError(
            f"{type(base_model(model)).__name__} changes itself by the texts that it reads ({names[0]}), so what it "
            "computes depends on what came before; fix that in its config, or use `trl dpo`."
        )


@contextmanager
def as_it_was(model: Any, *, exact: bool) -> Iterator[None]:
    """Put back each module's mode, weights, half precision and the random state afterwards.

    Meanwhile the model is in evaluation mode, outside mixed precision, and in float32 where it was in half precision and
    ``exact``: nothing else tells a leak from rounding. A first pass lets models scale weights for evaluation, as RWKV does,
    and training scale back what is put back here. New adapters and blocks begin at zero or as the identity and would
    hide what they do, so weights are moved: those that are zero, those that are small, and the first rows of the others.
    """
    modes = [(module, module.training) for module in model.modules()]
    # Accelerate puts mixed precision around a model that is trained already, and inside what is put around it here.
    ours = (model, base_model(model)) if layout_of(model) else ()
    wrapped = {one: one.forward for one in ours if "_original_forward" in vars(one)}
    for one in wrapped:
        one.forward = vars(one)["_original_forward"]
    devices = [model.device] if model.device.type == "cuda" else []
    model.train(mode=False)
    with suppress(*FAULTS), torch.no_grad(), torch.random.fork_rng(devices=devices):
        model(input_ids=plain_ids(model)[None, :2].to(model.device), use_cache=False)
    halves: dict[tuple[int, torch.dtype], list[Tensor]] = {}
    for tensor in (*model.parameters(), *model.buffers()) if exact else ():
        if tensor.dtype in {torch.float16, torch.bfloat16} and tensor.numel():
            plain = type(tensor.data) is Tensor
            storage = tensor.untyped_storage().data_ptr() if plain else id(tensor)
            halves.setdefault((storage, tensor.dtype), []).append(tensor)
    trained = [p for p in model.parameters() if p.requires_grad and p.is_floating_point()]
    noisy = [(p, _moved_part(p)) for p in trained]
    before = [p.data[part].clone() if p.any() else None for p, part in noisy]
    try:
        with torch.random.fork_rng(devices=devices), torch.autocast(model.device.type, enabled=False):
            torch.manual_seed(0)
            for views in halves.values():
                _convert(views, torch.float32)
            for parameter, part in noisy:
                parameter.data[part].add_(torch.randn_like(parameter.data[part]), alpha=NOISE)
            yield
    finally:
        for (_, dtype), views in halves.items():
            _convert(views, dtype)
        for (parameter, part), data in zip(noisy, before, strict=True):
            parameter.data.zero_() if data is None else parameter.data[part].copy_(data)
        for module, mode in modes:
            module.training = mode
        for one, forward in wrapped.items():
            one.forward = forward


def _moved_part(parameter: Tensor) -> Any:
    """Return the index of what is moved of a weight."""
    whole = parameter.numel() <= SMALL or not parameter.any()
    return ... if whole else slice(max(1, SMALL // parameter[0].numel()))


def _convert(views: list[Tensor], dtype: torch.dtype) -> None:
    """Convert tensors that share their storage, so that they still do."""
    if len(views) == 1:
        views[0].data = views[0].data.to(dtype)
        return
    steps = [[(size - 1) * step for size, step in zip(view.shape, view.stride(), strict=True)] for view in views]
    start = min(view.storage_offset() for view in views)
    end = max(view.storage_offset() + sum(each) + 1 for view, each in zip(views, steps, strict=True))
    whole = views[0].data.as_strided((end - start,), (1,), start).to(dtype)
    for view in views:
        view.data = whole.as_strided(view.shape, view.stride(), view.storage_offset() - start)


@contextmanager
def buffers_put_back(model: Any) -> Iterator[list[str]]:
    """Put buffers back afterwards, and name those that had changed in the list that is given.

    A pass over texts of the same length should come before, as rope that scales with length keeps angles in a buffer.

    Raises:
        PersodpoError: A weight has changed, of which there is no copy.
    """
    before = {path: (buffer, buffer.clone()) for path, buffer in model.named_buffers()}
    weights = _hashes(model)
    names: list[str] = []
    try:
        yield names
    finally:
        after = dict(model.named_buffers())  # a statistic may be another tensor now
        names.extend(
            path for path, (_, value) in before.items()
            if path in after and not torch.equal(after[path].nan_to_num(), value.nan_to_num())
        )  # fmt: skip
        for path in names:
            owner, _, name = path.rpartition(".")
            buffer, value = before[path]
            model.get_submodule(owner)._buffers[name] = buffer.copy_(value)
    if others := [path for path, value in _hashes(model).items() if value != weights.get(path, value)]:
        raise PersodpoError(
            f"{type(base_model(model)).__name__} changes {others[0]} in a training pass, as where weights are clipped or "
            "normalised on the way, so the reference would be that of a changed model; load it anew and use `trl dpo`."
        )


def _hashes(model: Any) -> dict[str, int]:
    """Return a number for each weight that another content changes."""
    return {
        path: int(torch.hash_tensor(weight.data).item()) for path, weight in model.named_parameters() if weight.numel()
    }


@contextmanager
def without_dropout(model: Any) -> Iterator[None]:
    """Set every dropout to 0 meanwhile: modules of torch, and rates that modules keep as numbers."""
    rates = [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, float) and ("drop" in name or (name == "p" and "Dropout" in type(module).__name__))
    ]
    try:
        for module, name, _ in rates:
            setattr(module, name, 0.0)
        yield
    finally:
        for module, name, value in rates:
            setattr(module, name, value)
