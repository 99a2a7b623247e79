"""A tiny model with random weights of every model type that has a causal head in transformers, and two steps of training it.

A configuration is shrunk by the names of its settings, those inside it alike, so that a type needs an entry in `EXTRAS`
only where its sizes depend on one another. What drops, jitters or adds noise is switched off; what scales or caps logits,
and what weighs the auxiliary loss of experts, is set to values that show.
"""

from __future__ import annotations

import math
import random
import re
import tempfile
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, Literal, get_args

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from persodpo.training.packing import Group
from persodpo.training.trainer import GroupedDPOConfig, GroupedDPOTrainer

#: ``window 8``, ``window 40``: attention reaches back as many positions, in one of two layers where layers differ.
#: ``encoder``: as encoders are published, each position sees those behind it.
Variant = Literal["plain", "window 8", "window 40", "encoder"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
VOCABULARY, DEVIATION = 64, 0.2
TOKENS = {"pad_token_id": 2, "eos_token_id": 1, "bos_token_id": 0}
#: Sizes by the name of a setting; the first pattern that fits counts. Set where there is a whole number other than 0.
SIZES = [
    (r".*vocab_size(?!_base).*|vocab_offset", VOCABULARY),
    (r"max_position_embeddings|n_positions|n_ctx|max_(seq_len|\w+_positions)|context_length|model_max_length", 256),
    (r"(swa_|mamba_|qk_nope_|qk_rope_|index_|linear_key_|linear_value_|linear_|v_)?head_?dim|rotary_dim", 8),
    (r"mamba_d_head|dim_head|d_head|d_kv|kv_channels|attention_head_(dim|size)|d_rel|query_pre_attn_scalar", 8),
    (r"(swa_)?num_key_value_heads|num_kv_heads|kv_n_heads|linear_num_key_heads|num_query_groups", 2),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads|mamba_heads", 8),
    (r"(num_|n_|swa_num_)?((en|de)coder_)?(attention_)?heads?|linear_num(_value)?_heads", 4),
    (r"hidden_size(_global)?|\w+_hidden_size|d_model|n_embd|lru_width|adapter_(in|out)_dim|adapter_input_size", 32),
    (r"(\w+_)?embed(ding)?(_proj)?_(dim|size)|emb_dim|(out|ext_pw_out|nemo_conv|base|output)_channels?", 32),
    (r".*intermediate_size(_mlp)?|d_ff|dff|dim_ff|.*ffn_dim|.*ffn_hidden_size|mlp_dim|d_inner|feed_forward_size", 64),
    (r".*lora_rank|.*_rank|hidden_size_per_layer_input|prompt_mid_dim|mamba_d_state|.*state_size|hc_lowrank", 8),
    (r"index_n_heads", 16),
    (r"(num|n)_(local_|routed_)?experts|moe_num_experts|zero_expert_num", 4),
    (r"num_experts_per_tok(en)?|moe_top_?k|moe_k", 2),
    (r"n_groups?|topk_group|num_expert_group|(num|n|moe_num)_shared_experts|num_dense_layers|first_k_dense_replace", 1),
    (r"(mamba_)?chunk_size|block_size", 16),
    (r"num_nextn_predict_layers", 0),
]
LAYERS = r"num_hidden_layers|n_layers?|num_layers|num_blocks|((en|de)coder_|num_(en|de)coder_)layers|depth"
#: Configurations inside one that are not of the language model.
OTHER_PARTS = "vision|audio|vq|encoder|patcher"
#: Settings that hold a word for each layer.
LISTS = ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types", "block_types")
SETTINGS = {
    "learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 1e9, "logging_steps": 1, "bf16": False, "report_to": [],
    "gradient_checkpointing": False, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "max_steps": 2,
    "lr_scheduler_type": "constant", "train_sampling_strategy": "sequential",
}  # fmt: skip
#: Scales and caps of logits, and the weight of the auxiliary loss.
SCALES = {
    r"logit_scale|logits_scaling|lm_head_multiplier|output_multiplier|logits_mup_width_multiplier": 0.5,
    r"router_aux_loss_coef": 0.5,
    r"\w*logits?_soft_?cap(ping)?": 5.0,
}
#: How far attention reaches; by other measures than positions, one block of four.
WINDOWS = (
    r"(local_)?attention_(chunk|window)_(size|len)|sliding_window(_size)?|(keep_)?window_size|local_attention|"
    r"local_attention_window_len|(local|lsh)_attn_chunk_length|index_topk|indexer_budget"
)
BLOCKS = {r"index_topk_blocks": 1, r"index_block_size": 4}
_AXIAL = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
_DOTS3 = {
    "num_key_value_heads": 4, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "head_dim": 16,
    "swa_q_lora_rank": 8, "swa_kv_lora_rank": 8, "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8,
}  # fmt: skip
_GEMMA3N = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
            "num_hidden_layers": 4, "intermediate_size": 64}  # fmt: skip
_QSA = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 64,
        "indexer_compress_ratio": 4}  # fmt: skip
#: What a type wants besides.
EXTRAS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": _AXIAL, "full_attention": _AXIAL},
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {"text_config": _DOTS3},
    "dots3_note_text": _DOTS3,
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n": {"text_config": _GEMMA3N},
    "gemma3n_text": _GEMMA3N,
    "gemma4": {"text_config": {"final_logit_softcapping": 5.0}},
    "gemma4_text": {"final_logit_softcapping": 5.0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"], "index_n_heads": 2},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp": {"text_config": _QSA},
    "qwen4_exp_text": _QSA,
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"], "hash_seed": 0, "num_buckets": 4},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3,
              "attention_head_dim": 16, "attention_hidden_size": 64},
    "zamba2": {"attention_head_dim": 16, "attention_hidden_size": 64},
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid", "hybrid_sliding"], "sliding_window": 4096},
}  # fmt: skip


def named(name: str, values: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Return a setting with the value of the first pattern that fits its name; nothing where none does."""
    return next(({name: value} for pattern, value in values if re.fullmatch(pattern, name)), {})


def shrink(config: PreTrainedConfig, variant: Variant = "plain") -> dict[str, Any]:
    """Return the settings that make a configuration tiny.

    Args:
        config: With its defaults.
        variant: What of its attention is wanted.

    Returns:
        Settings by name; a dictionary of the same kind for each configuration in it.
    """
    settings = vars(config)
    kinds = {name: list(dict.fromkeys(settings[name])) for name in LISTS if settings.get(name)}
    layers = max([2, *map(len, kinds.values())])
    found: dict[str, Any] = {name: kind + kind[-1:] * (layers - len(kind)) for name, kind in kinds.items()}
    wanted = TOKENS | {"use_cache": False, "is_decoder": variant != "encoder", "head_dim": 8}
    found |= {name: value for name, value in wanted.items() if name in settings}
    for name, value in settings.items():
        if isinstance(value, PreTrainedConfig):
            found[name] = shrink(value, "plain" if re.search(OTHER_PARTS, name) else variant)
        elif isinstance(value, float) and re.search("drop|jitter|noise", name):
            found[name] = 0.0
        elif isinstance(value, float) and value:
            found |= named(name, SCALES.items())
        elif isinstance(value, int) and not isinstance(value, bool) and value:
            found |= named(name, [(LAYERS, layers), *SIZES])
    return found


def with_window(config: PreTrainedConfig, window: int) -> dict[str, Any]:
    """Return the settings that shorten the reach of attention, for a configuration and those in it; empty without any.

    Args:
        config: With its defaults.
        window: The reach, positions.
    """
    settings = vars(config)
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, PreTrainedConfig) and not re.search(OTHER_PARTS, name):
            inner = with_window(value, window)
            found |= {name: inner} if inner else {}
        found |= named(name, [(WINDOWS, window), *BLOCKS.items()])
    kinds = set(settings.get("layer_types") or ())
    if "sliding_window" in found and kinds in ({"sliding_attention"}, {"full_attention"}):
        found["layer_types"] = ["sliding_attention", "full_attention"]
    return found | ({"use_sliding_window": True} if "use_sliding_window" in settings and found else {})


def merge(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return settings with others on top, dictionaries within dictionaries."""
    return one | {
        name: merge(one[name], value) if isinstance(value, dict) and isinstance(one.get(name), dict) else value
        for name, value in other.items()
    }


def tiny_config(kind: str, variant: Variant = "plain") -> PreTrainedConfig | None:
    """Return a tiny configuration, None where the type has no such variant.

    Args:
        kind: Model type.
        variant: What of its attention is wanted.
    """
    config, extra = CONFIG_MAPPING[kind], EXTRAS.get(kind, {})
    default = config()
    window = int(variant.removeprefix("window")) if variant.startswith("window") else 0
    windows = with_window(default, window) if window else {}
    if (window and not windows) or (variant == "encoder" and vars(default).get("is_decoder") is not False):
        return None
    heads = {"num_key_value_heads": 4} if "kv_lora_rank" in vars(default) else {}
    return config(**merge(merge(shrink(default, variant), heads | extra), windows))


def tiny_model(kind: str, attention: str, variant: Variant = "plain", dtype: torch.dtype = torch.float64) -> Any:
    """Return a model in evaluation mode, None where the type has no such variant.

    Weights are drawn anew, matrices with standard deviation 0.2, so that attention and routing decide something; vectors
    are moved a little, as a bias of 0 hides what happens to it.
    """
    config = tiny_config(kind, variant)
    if config is None:
        return None
    torch.manual_seed(0)
    # Grouped products of matrices know no float64.
    experts = {"experts_implementation": "eager"} if dtype == torch.float64 else {}
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, **experts).to(dtype)
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=source, dtype=torch.float64).to(dtype)
            parameter.copy_(DEVIATION * noise if parameter.ndim > 1 else parameter + 0.05 * noise)
    return model.eval()


def plain_ids(config: PreTrainedConfig) -> list[int]:
    """Return the token ids that are plain text under a configuration and those in it, small ones left out."""
    special: set[int] = set()
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            special |= set(range(VOCABULARY)) - set(plain_ids(value))
        elif re.search("token_ids?$|_index$", name):
            special |= set(value if isinstance(value, list) else [value])
    return [number for number in range(10, VOCABULARY - 1) if number not in special]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose token ``number`` is ``w<number>``."""
    vocabulary = {"<unk>": 0, "<eos>": 1, "<pad>": 2} | {f"w{number}": number for number in range(3, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def tiny_pairs(ids: Sequence[int], variant: Variant) -> Dataset:
    """Return three prompts, the first beyond the window, with four pairs each of two chosen and two rejected responses.

    Args:
        ids: Tokens to draw from.
        variant: The model's.
    """
    source, rows = random.Random(0), []  # noqa: S311 - no secret
    for words in (60 if variant == "window 40" else 20, 5, 11):
        prompt = " ".join(f"w{source.choice(ids)}" for _ in range(words)) + "\n"
        sides = [" ".join(f"w{source.choice(ids)}" for _ in range(source.randint(2, 8))) for _ in range(4)]
        rows += [{"prompt": prompt, "chosen": sides[c], "rejected": sides[r]} for c in (0, 1) for r in (2, 3)]
    return Dataset.from_list(rows)


def plain_log_probs(model: Any, groups: list[Group], *, grad: bool = False) -> Tensor:
    """Return the log-probability of each response by a forward pass over prompt and response alone, [responses]."""
    sums = []
    with torch.set_grad_enabled(grad):
        for group in groups:
            for response in group.responses:
                tokens = torch.tensor([group.prompt + response])
                logits = model(input_ids=tokens).logits
                assert logits.shape[:2] == tokens.shape, f"logits of shape {tuple(logits.shape)}"
                log_probs = torch.log_softmax(logits[0, len(group.prompt) - 1 : -1].double(), -1)
                sums.append(log_probs.gather(-1, tokens[0, len(group.prompt) :, None]).sum())
    return torch.stack(sums)


def weights_of(model: Any) -> Tensor:
    """Return all weights in a row."""
    return torch.cat([parameter.detach().flatten().double() for parameter in model.parameters()])


def sides(pairs: Any) -> list[Group]:
    """Return each pair as a group of its chosen and its rejected response, ended."""
    tokenizer = tiny_tokenizer()

    def tokens(text: str) -> list[int]:
        return list(tokenizer(text)["input_ids"])

    return [Group(tokens(row["prompt"]), [[*tokens(row[side]), 1] for side in ("chosen", "rejected")]) for row in pairs]


def plain_steps(model: Any, pairs: Any, rate: float) -> tuple[Tensor, Tensor]:
    """Take two steps of plain DPO by passes over prompt and response alone; return losses and gradient norms."""
    groups, losses, norms = sides(pairs), [], []
    reference = plain_log_probs(model, groups).view(-1, 2)
    model.train()
    for _ in range(2):
        chosen, rejected = (plain_log_probs(model, groups, grad=True).view(-1, 2) - reference).unbind(1)
        loss = -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()
        model.zero_grad()
        loss.backward()
        moved = [parameter for parameter in model.parameters() if parameter.grad is not None]
        losses.append(loss.detach().double())
        norms.append(torch.stack([parameter.grad.double().norm() for parameter in moved]).norm())
        with torch.no_grad():
            for parameter in moved:
                parameter.sub_(rate * parameter.grad)
    return torch.stack(losses), torch.stack(norms)


def apart(one: Tensor, other: Tensor) -> float:
    """Return the largest difference, relative where values are above 1; infinite where one is not a number."""
    difference = float(((one - other).abs() / other.abs().clamp(min=1)).max())
    return math.inf if math.isnan(difference) else difference


@lru_cache(maxsize=8)
def steps(
    case: tuple[str, str, Variant], ids: tuple[int, ...], by: str, *, dtype: torch.dtype, aux: bool = True
) -> dict[str, Any]:
    """Train two steps.

    Args:
        case: Model type, attention and variant.
        ids: Token ids that are plain text.
        by: ``ours``, ``trl``, or ``plain`` for passes over prompt and response alone, without an auxiliary loss.
        aux: With the auxiliary loss that TRL has by default.
        dtype: Of the weights.

    Returns:
        ``losses``, ``norms``, and the ``way`` of all weights; of stock TRL also the ``gap`` between its reference
        log-probabilities and plain ones.
    """
    model, pairs = tiny_model(*case, dtype=dtype), tiny_pairs(ids, case[2])
    start, gap = weights_of(model), 0.0
    if by == "plain":
        losses, norms = plain_steps(model, pairs, SETTINGS["learning_rate"])
        return {"losses": losses, "norms": norms, "way": weights_of(model) - start}
    with tempfile.TemporaryDirectory() as folder:
        common = {"model": model, "train_dataset": pairs, "processing_class": tiny_tokenizer()}
        settings = SETTINGS | ({} if aux else {"router_aux_loss_coef": 0.0})
        if by == "trl":
            args = DPOConfig(folder, per_device_train_batch_size=len(pairs), precompute_ref_log_probs=True, **settings)
            trainer: Any = DPOTrainer(args=args, **common)
            known = [trainer.train_dataset[f"ref_{side}_logps"] for side in ("chosen", "rejected")]
            wanted = plain_log_probs(tiny_model(*case, dtype=dtype), sides(pairs))
            gap = apart(torch.tensor(list(zip(*known, strict=True))).flatten().double(), wanted)
        else:
            args = GroupedDPOConfig(folder, per_device_train_batch_size=len(set(pairs["prompt"])), **settings)
            trainer = GroupedDPOTrainer(args=args, **common)
        trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    losses, norms = (
        torch.tensor([entry[name] for entry in logs], dtype=torch.float64) for name in ("loss", "grad_norm")
    )
    return {"losses": losses, "norms": norms, "way": weights_of(trainer.model) - start, "gap": gap}
