"""Policies: any causal language model loaded, or a small one made from training texts in a minute.

The small policy has the architecture of Qwen2, so all that trains it also trains the real ones. It learns from the
texts alone: first a byte-level BPE, then a short causal-LM warm-up on the completions given their prompts,
by the packed forward pass of the trainer.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.utils.logging import disable_progress_bar
from transformers.utils.peft_utils import find_adapter_config_file

from persodpo.config import PolicySize
from persodpo.errors import PersodpoError
from persodpo.files import made_once, name_and_revision, sha256
from persodpo.imports import code_of
from persodpo.profile_text import Positive, Seed, setting
from persodpo.progress import bar, watched
from persodpo.training.forward import response_log_probs
from persodpo.training.groups import micro_batches
from persodpo.training.packing import Group, pack

RECORD = "policy.json"
WEIGHTS = "model.safetensors"
END, PAD = "<|endoftext|>", "<|pad|>"
MINIMUM_EXAMPLES = 8
LAYERS, HEADS, KEY_VALUE_HEADS = 2, 2, 1
#: Share of the steps over which the learning rate rises, and over which the last loss is averaged.
RAMP = 0.1

Examples = Sequence[tuple[str, str]]


class SmallPolicy(PolicySize):
    """Size and warm-up of the small policy."""

    max_length: int = setting("longest prompt and response together, tokens", 1024, ge=2)
    learning_rate: Positive = setting("of the warm-up, at its highest", 3e-3)
    seed: Seed = setting("of weights and batches")


def make_small_policy(examples: Examples, settings: SmallPolicy, folder: Path, *, start: Path | None = None) -> Path:
    """Make the small policy from prompts and completions, unless ``folder`` holds it already, made from the same.

    The same examples, settings and threads on the same machine give the same weights to the byte.

    Args:
        examples: The same prompt may come with several completions.
        settings: Size and warm-up.
        folder: Where model, tokenizer and record go. A small policy made from something else is replaced.
        start: A small policy to go on from, with its tokenizer and size; None for a new one.

    Returns:
        ``folder``, for `load_policy`.
    """
    _check(examples)
    basis = {
        "settings": settings.model_dump(mode="json"),
        "texts": hashlib.sha256(json.dumps(list(examples)).encode()).hexdigest(),
        "start": sha256(start / WEIGHTS) if start else None,
        "code": code_of(__name__, "persodpo.training"),
    }

    make = partial(_make, examples, settings, start)
    return made_once(folder, RECORD, basis, make, what="a small policy", needs=WEIGHTS)


def load_policy(
    name: str | Path, *, attention: str | None = None, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer.

    Only weights in safetensors are read, and no code that comes with a model is run. Adapters are merged into their base,
    and that is said.

    Args:
        name: A local folder or a name on the Hugging Face Hub, perhaps with ``@revision``: a commit, tag or branch.
        attention: Implementation of attention; None for the fastest that the model has.
        dtype: Type of the weights.

    Returns:
        The model, in evaluation mode on the CPU, and the tokenizer.
    """
    _no_bars_unwatched()
    full_name = str(name)
    name, revision = name_and_revision(full_name)
    model: Any
    loading: Any
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision or "main", trust_remote_code=False)
        adapter = find_adapter_config_file(name, revision=revision)
        config = json.loads(Path(adapter).read_text()) if adapter else {}
        base = str(config.get("base_model_name_or_path", name))
        model, loading = cast(Any, AutoModelForCausalLM).from_pretrained(
            base,
            attn_implementation=attention,
            dtype=dtype,
            revision=(revision if base == name else config.get("revision")) or "main",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        if adapter:
            wrapped: Any = PeftModel.from_pretrained(model, name, revision=revision, use_safetensors=True)
            model = wrapped.merge_and_unload()
            model.requires_grad_(requires_grad=True)
            tqdm.write(f"{name}: adapters, merged into their base {base}")
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise PersodpoError(
            f"Model '{full_name}' cannot be loaded ({type(error).__name__}: {reason}); "
            "name a folder that holds a causal language model with its tokenizer in safetensors, or a model on the Hugging "
            "Face Hub while the network is up."
        ) from error
    lacking = sorted(loading["missing_keys"]) + sorted(str(key[0]) for key in loading["mismatched_keys"])
    if lacking:
        raise PersodpoError(
            f"Model '{name}' lacks {len(lacking)} of its tensors, {lacking[0]} among them; copy it again."
        )
    if not tokenizer.decode(tokenizer("Hello there", add_special_tokens=False)["input_ids"]):
        raise PersodpoError(f"The tokenizer of '{name}' makes no token of \"Hello there\"; copy its vocabulary, too.")
    return model, tokenizer


def _no_bars_unwatched() -> None:
    if not watched():
        disable_progress_bar()  # type: ignore[no-untyped-call]


def _check(examples: Examples) -> None:
    if len(examples) < MINIMUM_EXAMPLES:
        raise PersodpoError(
            f"The small policy needs at least {MINIMUM_EXAMPLES} examples to learn from, not {len(examples)}."
        )
    for number, texts in enumerate(examples):
        if not all(text.strip() for text in texts):
            raise PersodpoError(f"Example {number} has an empty prompt or completion; leave it out.")


def _make(examples: Examples, settings: SmallPolicy, start: Path | None, folder: Path) -> dict[str, Any]:
    """Train tokenizer and model into ``folder`` and return what there is to say about it."""
    started = time.perf_counter()
    _no_bars_unwatched()
    tokenizer: Any
    model: Any
    if start is None:
        tokenizer = _train_tokenizer(examples, settings)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            model = _new_model(tokenizer, settings)
    else:
        model, tokenizer = load_policy(start)
    rows, lengths = _encode(examples, tokenizer, settings.max_length)
    losses = _train(model, rows, settings)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    last = losses[-max(1, round(RAMP * len(losses))) :]
    return {
        "examples": len(examples), "prompts": len(rows), **lengths,
        "vocabulary": len(tokenizer), "parameters": model.num_parameters(), "loss_start": losses[0],
        "loss_end": sum(last) / len(last), "seconds": round(time.perf_counter() - started, 3),
        "threads": torch.get_num_threads(),
    }  # fmt: skip


def _train_tokenizer(examples: Examples, settings: SmallPolicy) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on each distinct text once."""
    tokenizer = Tokenizer(models.BPE())
    # An opening brace is a token of its own: a completion starts with one, and must not merge with its prompt's end
    # when trainers tokenise the two together.
    split = pre_tokenizers.Split("{", "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary, special_tokens=[END, PAD], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(dict.fromkeys(text for example in examples for text in example), trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def _encode(examples: Examples, tokenizer: Any, max_length: int) -> tuple[list[Group], dict[str, int]]:
    """Tokenise and group examples; also count those cut (the completion lost its end) and left out (too long a prompt)."""
    by_prompt: dict[str, dict[str, None]] = {}
    for prompt, completion in examples:
        by_prompt.setdefault(prompt, {})[completion] = None
    groups, cut, left_out = [], 0, 0
    for prompt, completions in by_prompt.items():
        prompt_ids = tokenizer(prompt)["input_ids"]
        room = max_length - len(prompt_ids)
        if room <= 0:
            left_out += len(completions)
            continue
        ids = tokenizer([text + END for text in completions])["input_ids"]
        cut += sum(len(response) > room for response in ids)
        groups.append(Group(prompt_ids, [response[:room] for response in ids]))
    if not groups:
        raise PersodpoError(f"Every prompt fills the length limit of {max_length} tokens; raise max_length.")
    return groups, {"cut": cut, "left_out": left_out}


def _new_model(tokenizer: PreTrainedTokenizerFast, settings: SmallPolicy) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=settings.hidden_size,
        intermediate_size=32 * max(1, settings.hidden_size // 10),
        num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=KEY_VALUE_HEADS,
        max_position_embeddings=settings.max_length,
        tie_word_embeddings=True, dtype=torch.float32, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def _batches(groups: Sequence[Group], settings: SmallPolicy) -> Iterator[list[Group]]:
    """Yield batches of rows of like length, in a new order every pass, without end."""
    shuffler = random.Random(settings.seed)  # noqa: S311 - repeatable, not secret
    batches = list(micro_batches(groups, settings.batch_tokens))
    while True:
        shuffler.shuffle(batches)
        for places in batches:
            yield [groups[place] for place in places]


def _train(model: PreTrainedModel, groups: Sequence[Group], settings: SmallPolicy) -> list[float]:
    """Run the warm-up; return the loss of each step, in nats a completion token."""
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    ramp = max(1, round(RAMP * settings.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / ramp, (settings.steps - step) / max(1, settings.steps - ramp))
    )
    model.train()
    losses: list[float] = []
    batches = _batches(groups, settings)
    for _ in bar(range(settings.steps), "small policy, warm-up"):
        rows = pack(next(batches))
        loss = -response_log_probs(model, rows).sum() / rows.lengths.sum()
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
    model.train(False)
    return losses
