"""Packed rows on architectures that read a row otherwise than Llama does: right, or said not to be."""

from __future__ import annotations

import copy
import math
import random
import types
from contextlib import suppress
from functools import partial

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from tiny import WORDS, grouped, logs, plain_log_probs, stock, tiny_model, trained
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2Model, apply_rotary_pos_emb

from persodpo.errors import PersodpoError
from persodpo.training import forward
from persodpo.training.checks import check_models
from persodpo.training.guard import check_packing
from persodpo.training.packing import Group, Layout, pack
from persodpo.training.probe import longest_window, random_groups

pytestmark = pytest.mark.usefixtures("one_thread")

#: Model type, attention, what its config adds -> grouped, or one response per row.
ARCHITECTURES = {
    "eager, an added mask": ("qwen2", "eager", {}, True),
    "scaled logits": ("granite", "sdpa", {"logits_scaling": 8.0}, True),
    "scaled logits, nested config": ("cohere2", "sdpa", {"logit_scale": 0.3, "sliding_window": 8}, True),
    "soft caps, window, eager": ("gemma2", "eager", {"sliding_window": 8, "head_dim": 8}, True),
    "window in every layer": ("mistral", "sdpa", {"sliding_window": 8}, True),
    "window in every layer, eager": ("mistral", "eager", {"sliding_window": 8}, True),
    "window by layer": (
        "gemma3_text", "sdpa",
        {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 8}, True,
    ),
    "sinks": ("gpt_oss", "eager", {"sliding_window": 8, "num_local_experts": 4, "head_dim": 8}, True),
    "experts": ("mixtral", "sdpa", {"num_local_experts": 4}, True),
    "convolution": ("lfm2", "sdpa", {"layer_types": ["conv", "full_attention"]}, False),
    "linear attention": (
        "qwen3_5_text", "sdpa",
        {"layer_types": ["linear_attention", "full_attention"], "head_dim": 8, "linear_num_key_heads": 2,
         "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}, False,
    ),
    "recurrence": ("mamba", "eager", {"state_size": 4}, False),
    "positions from columns": ("mpt", "eager", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 256}, False),
    "ALiBi": ("bloom", "eager", {"n_head": 4, "n_layer": 2}, False),
    "a decoder of bart": ("bart", "eager", {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4}, False),
}  # fmt: skip


def architecture(kind: str, attention: str, extra: dict) -> torch.nn.Module:
    """The probe of the cases: a tiny model with matrices of standard deviation 0.2."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 2, "eos_token_id": 1, "bos_token_id": 0,
    }  # fmt: skip
    config = AutoConfig.for_model(kind, **(sizes | extra))
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    return model


GROUPS = [
    Group(list(range(3, 17)), [list(range(20, 29)), list(range(30, 36)), list(range(40, 51))]),
    Group(list(range(50, 55)), [list(range(20, 22)), list(range(9, 17))]),
]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_log_probs_are_those_of_plain_forward_passes(name):
    kind, attention, extra, grouped = ARCHITECTURES[name]
    model = architecture(kind, attention, extra)
    with torch.no_grad():
        plain = torch.cat([plain_log_probs(model, group) for group in GROUPS])
        verdict = check_packing(model, max_length=64, token_budget=256)
        packed = model(packed=pack(GROUPS, Layout(grouped=verdict.grouped, pad_token_id=2)))
    assert verdict.grouped is grouped
    assert bool(verdict.reason) is not grouped
    assert torch.allclose(packed, plain, atol=1e-3)
    again = model(input_ids=torch.tensor([GROUPS[0].prompt])).logits
    assert torch.isfinite(again).all(), "other calls stay what they were"


@pytest.mark.parametrize(
    "name",
    ["eager, an added mask", "soft caps, window, eager", "window by layer", "scaled logits", "experts", "convolution",
     "positions from columns"],
)  # fmt: skip
def test_steps_are_stock_trls(name, tmp_path, recwarn):
    """Losses, gradients and the auxiliary loss of experts, which TRL adds by default."""
    kind, attention, extra, packs = ARCHITECTURES[name]
    extra = extra | ({"router_aux_loss_coef": 0.5} if name == "experts" else {})
    ours = trained(grouped(tmp_path / "a", model=architecture(kind, attention, extra), token_budget=4096))
    model = architecture(kind, attention, extra)
    theirs = trained(stock(tmp_path / "b", model=model, precompute_ref_log_probs=True))
    for key in ["loss", "grad_norm", *(["aux_loss"] if name == "experts" else [])]:
        assert logs(ours, key) == pytest.approx(logs(theirs, key), rel=2e-4, abs=1e-5), key
    assert logs(ours, "num_tokens") == logs(theirs, "num_tokens")
    told = [str(warning.message) for warning in recwarn if "one response per row" in str(warning.message)]
    assert len(told) == (0 if packs else 1)
    assert packs or (type(ours.model).__name__ in told[0] and attention in told[0])


def test_the_guarantees_hold_with_one_response_per_row(tmp_path):
    """Checkpointing, a small budget, half precision."""

    def model():
        return architecture(*ARCHITECTURES["convolution"][:3])

    plain = trained(grouped(tmp_path / "a", model=model(), token_budget=4096))
    small = trained(grouped(tmp_path / "b", model=model(), token_budget=60, gradient_checkpointing=True))
    assert not plain.packing.grouped
    assert logs(small, "loss") == pytest.approx(logs(plain, "loss"), abs=1e-5)
    assert logs(small, "grad_norm") == pytest.approx(logs(plain, "grad_norm"), rel=1e-4)
    assert logs(plain, "loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    half = trained(grouped(tmp_path / "c", model=model(), bf16=True))
    assert logs(half, "loss") == pytest.approx(logs(plain, "loss"), abs=0.05)


def with_moved_logits(factor) -> torch.nn.Module:
    """A model whose head is its own: logits are moved after the projection, by what no rule knows."""
    model = architecture("qwen2", "sdpa", {})
    plain = type(model).forward

    class Own(type(model)):
        def forward(self, *args, **kwargs):
            outputs = plain(self, *args, **kwargs)
            outputs.logits = outputs.logits * factor(outputs.logits)
            return outputs

    model.__class__ = Own
    return model


def test_a_model_whose_head_is_its_own_computes_its_own_logits():
    model = with_moved_logits(lambda logits: torch.linspace(0.2, 2.0, logits.shape[-1]))
    verdict = check_packing(model, max_length=64)
    assert (verdict.grouped, verdict.own_head) == (True, True)
    with torch.no_grad():
        expected = torch.cat([plain_log_probs(model, group) for group in GROUPS])
        assert torch.allclose(model(packed=pack(GROUPS)), expected, atol=1e-3)


def test_a_model_that_is_wrong_in_every_layout_is_refused_by_name():
    """Each position sees how long its row is."""
    with pytest.raises(PersodpoError, match=r"Own under attention 'sdpa' .* nats per token apart"):
        check_packing(with_moved_logits(lambda logits: 1 + logits.shape[1] / 10), max_length=64)


def test_the_guard_sees_what_a_new_adapter_hides():
    """LoRA begins at zero; an adapter that is lost in packed rows must be noticed before it is trained."""
    model = get_peft_model(architecture("qwen2", "sdpa", {}), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    assert check_packing(model, max_length=64).grouped
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    forward = model.base_model.model.forward

    def without_adapter(*args, packed=None, **kwargs):
        if packed is None:
            return forward(*args, **kwargs)
        with model.disable_adapter():
            return forward(*args, packed=packed, **kwargs)

    without_adapter.packs_for = model.base_model.model
    model.base_model.model.forward = without_adapter
    with pytest.raises(PersodpoError):
        check_packing(model, max_length=64)


def test_windows_are_found_wherever_a_config_keeps_them():
    assert longest_window(architecture("mistral", "sdpa", {"sliding_window": 8}), 64) == 8
    assert longest_window(architecture("mistral", "sdpa", {"sliding_window": 80}), 64) == 0
    nested = architecture("gemma3_text", "sdpa", {"sliding_window": 16, "head_dim": 8})
    nested.config.inner = AutoConfig.for_model("llama4_text", attention_chunk_size=24)
    assert longest_window(nested, 64) == 24
    model = tiny_model()
    model.config.attention_window = [1500, 1500]
    model.config.layers = ({"local_span": 700.0},)
    assert [longest_window(model, limit) for limit in (4096, 1000)] == [1500, 700]


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}),
        ("xlm-roberta", {"is_decoder": True, "max_position_embeddings": 64, "pad_token_id": 1}),
    ],
)
def test_a_model_that_ends_before_the_probe_is_tried_on_a_shorter_text(kind, extra):
    assert not check_packing(architecture(kind, "eager", extra)).grouped


def test_a_window_longer_than_the_probe_is_still_reached(monkeypatch):
    """A model of a window of 40 that forgets it in packed rows is noticed, as the group is made longer."""
    model = architecture("mistral", "sdpa", {"sliding_window": 40})
    assert check_packing(model, max_length=128).grouped
    monkeypatch.setattr(
        "persodpo.training.packing.PackedRows.mask", lambda self, window=None, dtype=None: self.attention_mask
    )
    assert not check_packing(model, max_length=128).grouped


def test_the_guard_leaves_everything_as_it_was():
    """Modes of modules, the random state, and half-precision weights that share their storage, as wholes or as views."""
    model = tiny_model().to(torch.bfloat16).train()
    rows, mlp = torch.randn(128, 32).to(torch.bfloat16), model.model.layers[0].mlp
    mlp.gate_proj.weight, mlp.up_proj.weight = (torch.nn.Parameter(rows[start : start + 64]) for start in (0, 32))
    mlp.down_proj.weight = torch.nn.Parameter(rows[:64].t())
    model.model.layers[0].eval()
    model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.data)
    modes, before = [module.training for module in model.modules()], model.lm_head.weight.clone()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    check_packing(model, max_length=64)
    assert torch.equal(torch.rand(3), expected)
    assert [module.training for module in model.modules()] == modes
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert torch.equal(model.lm_head.weight, before)
    assert torch.equal(mlp.gate_proj.weight, rows[:64])
    mlp.gate_proj.weight.data[40] += 1
    assert torch.equal(mlp.up_proj.weight[8], mlp.gate_proj.weight[40])
    assert torch.equal(mlp.down_proj.weight.t(), mlp.gate_proj.weight)


def test_pads_inside_texts_are_text():
    """A model that pads with the token that ends turns of a chat, in one response per row."""
    model = architecture(*ARCHITECTURES["convolution"][:3])
    model.config.pad_token_id = 7
    plain = type(model.model).forward

    def from_pads(self, input_ids=None, attention_mask=None, **rest):
        if attention_mask is None:
            attention_mask = input_ids.ne(self.config.pad_token_id).long()
        return plain(self, input_ids=input_ids, attention_mask=attention_mask, **rest)

    model.model.forward = types.MethodType(from_pads, model.model)
    group = Group([5, 7, 9, 7, 11], [[8, 7, 12], [13, 14]])
    assert not check_packing(model, max_length=64).grouped
    with torch.no_grad():
        expected = [
            torch.log_softmax(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, 4:-1].float(), -1)
            .gather(-1, ids[0, 5:, None]).sum()
            for ids in (torch.tensor([group.prompt + response]) for response in group.responses)
        ]  # fmt: skip
        packed = model(packed=pack([group], Layout(grouped=False, pad_token_id=7)))
    assert torch.allclose(packed, torch.stack(expected), atol=1e-4)


NEO = {"max_position_embeddings": 64, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}


def test_rows_beyond_a_table_of_columns_are_reached():
    """GPT-Neo holds its mask by columns: rows that are longer than it are not grouped, and are where rows are shorter."""
    model = architecture("gpt_neo", "eager", NEO)
    assert check_packing(model, max_length=40, token_budget=64).grouped
    assert not check_packing(model, max_length=40, token_budget=64, widest=65).grouped


def test_the_widest_row_of_the_data_is_tried(tmp_path):
    """One pair is never split, so that its row may be wider than both limits."""
    neo = partial(architecture, "gpt_neo", "eager", NEO)
    for words, fits in ((36, False), (10, True)):
        texts = [" ".join(random.Random(number).choices(WORDS, k=words)) for number in range(4)]
        pairs = [{"prompt": "w1 w2\n", "chosen": texts[n], "rejected": texts[n + 1]} for n in (0, 2)]
        trainer = grouped(tmp_path, Dataset.from_list(pairs), model=neo(), max_length=48, token_budget=16)
        assert trainer.packing.grouped is fits


def test_the_part_of_attention_without_a_mask_is_tried(monkeypatch):
    """Rows that are all in their prompts at first take another kernel, which may be wrong by itself."""
    plain = forward.sdpa_attention_forward

    def wrong(module, query, key, value, mask, **kwargs):
        if kwargs.get("is_causal"):
            value = value * 1.2
        return plain(module, query, key, value, mask, **kwargs)

    model = tiny_model()
    monkeypatch.setattr(forward, "sdpa_attention_forward", wrong)
    assert not check_packing(model, max_length=1024).grouped


def of_kind(name: str) -> LoraConfig:
    adapters = LoraConfig(task_type="CAUSAL_LM")
    adapters.peft_type = name
    return adapters


PROMPTS = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (PromptTuningConfig(**PROMPTS), "PromptTuningConfig"),
        (PrefixTuningConfig(**PROMPTS), "PrefixTuningConfig"),
        (PromptEncoderConfig(**PROMPTS, encoder_hidden_size=32), "PromptEncoderConfig"),
        (LoraConfig(r=4, task_type="CAUSAL_LM", alora_invocation_tokens=[10, 11]), "LoraConfig"),
        (of_kind("LILY"), "LILY cannot be trained on packed rows"),
        (of_kind("PVERA"), "PVERA cannot be trained on packed rows"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_adapters_that_see_a_sequence_or_a_batch_are_refused_by_name(tmp_path, config, words):
    with pytest.raises(PersodpoError, match=words):
        grouped(tmp_path, peft_config=config)
    if words.startswith("Pr"):
        with pytest.raises(PersodpoError, match=words):
            check_packing(get_peft_model(tiny_model(), config))


def test_attention_without_masks_trains_one_response_per_row():
    """As flash attention: a kernel that is told only that rows are causal."""

    def causal(module, query, key, value, attention_mask, **kwargs):
        return sdpa_attention_forward(module, query, key, value, None, **kwargs | {"is_causal": True})

    AttentionInterface.register("maskless", causal)
    model = tiny_model()
    model.set_attn_implementation("maskless")
    verdict = check_packing(model, max_length=64)
    assert not verdict.grouped
    assert "sdpa" in verdict.reason
    with torch.no_grad():
        expected = torch.cat([plain_log_probs(model, group) for group in GROUPS])
        assert torch.allclose(model(packed=pack(GROUPS, Layout(grouped=False))), expected, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "deviation"),
    [("convolution", 0.02), ("linear attention", 0.02), ("recurrence", 0.2), ("positions from columns", 0.2)],
)
def test_half_precision_and_small_weights_hide_no_leak(name, deviation):
    """In bf16 a leak is no larger than rounding, and where weights are small hardly anything moves anything."""
    kind, attention, extra, _ = ARCHITECTURES[name]
    model = architecture(kind, attention, extra)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(deviation / 0.2)
    weights = {key: value.clone() for key, value in model.to(torch.bfloat16).state_dict().items()}
    assert not check_packing(model, max_length=64).grouped
    for key, value in model.state_dict().items():
        assert value.dtype == weights[key].dtype, "put back"
        assert torch.equal(value, weights[key])
    assert check_packing(tiny_model().to(torch.bfloat16), max_length=64).grouped


SPARSE = {
    "index_topk": 40, "index_head_dim": 8, "kv_lora_rank": 8, "q_lora_rank": 8, "v_head_dim": 8, "num_key_value_heads": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
}  # fmt: skip


def test_attention_that_depends_on_its_name_generates_as_before():
    """DeepSeek's sparse attention picks the best keys under the names 'eager' and 'sdpa' alone."""
    some = {"index_n_heads": 2, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "moe_intermediate_size": 16}
    others = {"index_n_heads": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "moe_intermediate_size": 64}
    model = architecture("deepseek_v32", "sdpa", SPARSE | some | {"first_k_dense_replace": 1})
    ids = torch.randint(10, 60, (1, 90), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False).logits
        # Its selection of keys has ties that tokens behind a response can turn; then it is refused.
        with suppress(PersodpoError):
            assert not check_packing(model, max_length=128).grouped
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, before)
        model = architecture("deepseek_v32", "sdpa", SPARSE | others | {"mlp_layer_types": ["dense", "sparse"]})
        before = model(input_ids=ids, use_cache=False).logits
        assert check_packing(model, max_length=30, token_budget=38).grouped
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, before)


def test_what_changes_after_the_guard_is_noticed(tmp_path):
    trainer = grouped(tmp_path, model=architecture("mistral", "sdpa", {"sliding_window": 8}))
    with pytest.raises(PersodpoError, match="copy"):
        check_packing(copy.deepcopy(trainer.model))
    trainer.model.set_attn_implementation("sdpa")
    with pytest.raises(PersodpoError, match="Attention was set to 'sdpa'"):
        trainer.train()


LONG = Group([3 + n % 60 for n in range(90)], GROUPS[0].responses)
CHUNKS = {
    "attention_chunk_size": 40, "max_position_embeddings": 32, "head_dim": 8, "intermediate_size_mlp": 64,
    "num_local_experts": 4,
}  # fmt: skip
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, "max_position_embeddings": 64}
BLOCKS = {
    "index_topk_blocks": 4, "index_block_size": 16, "index_local_blocks": 1, "head_dim": 8, "num_local_experts": 4,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "extra", "limit"),
    [("llama4_text", CHUNKS, 128), ("llama4_text", CHUNKS, None), ("llama", DYNAMIC, None),
     ("minimax_m3_vl_text", BLOCKS, 128)],
)  # fmt: skip
def test_lengths_from_which_on_a_model_computes_otherwise_are_reached(kind, extra, limit):
    """Chunks longer than the positions, angles that change beyond them, a window that is a product of two entries.

    Packed rows are right, or the model is refused.
    """
    model = architecture(kind, "sdpa", extra)
    with torch.no_grad(), suppress(PersodpoError):
        plain = plain_log_probs(model, LONG)
        verdict = check_packing(model, max_length=limit, token_budget=256)
        packed = model(packed=pack([LONG], Layout(grouped=verdict.grouped, pad_token_id=2)))
        assert torch.allclose(packed, plain, atol=1e-3)


def test_blocks_that_begin_at_zero_are_seen():
    model = architecture(*ARCHITECTURES["convolution"][:3])
    weights = [weight for name, weight in model.named_parameters() if "conv.out_proj" in name]
    for weight in weights:
        weight.data.zero_()
    assert not check_packing(model, max_length=64).grouped
    assert not any(weight.any() for weight in weights)


def test_a_row_that_moves_other_rows_is_refused():
    class OverTheBatch(torch.nn.Linear):
        def forward(self, states):
            return super().forward(states) + 0.1 * states.mean()

    model = tiny_model()
    own = model.model.layers[0].mlp.down_proj
    model.model.layers[0].mlp.down_proj = OverTheBatch(own.in_features, own.out_features, bias=False)
    with pytest.raises(PersodpoError, match="other log-probabilities"):
        check_packing(model, max_length=64)


class Canon(torch.nn.Module):
    """A causal convolution that begins as the identity, as when it is put into a pretrained model."""

    def __init__(self, norm):
        """Put it behind a norm."""
        super().__init__()
        self.norm, width = norm, norm.weight.numel()
        self.conv = torch.nn.Conv1d(width, width, 4, groups=width, padding=3, bias=False)
        torch.nn.init.zeros_(self.conv.weight)
        self.conv.weight.data[:, :, -1] = 1

    def forward(self, states):
        mixed = self.conv(self.norm(states).transpose(1, 2))
        return mixed[..., : states.shape[1]].transpose(1, 2)


class OwnAttention(Qwen2Attention):
    """Attention by torch's kernel, with a mask that `own_mask` may change."""

    def own_mask(self, mask, query):
        return mask

    def forward(self, hidden_states, position_embeddings, attention_mask=None, **_):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            project(hidden_states).view(shape).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = (states.to(value.dtype) for states in apply_rotary_pos_emb(query, key, *position_embeddings))
        mask = self.own_mask(attention_mask, query)
        output = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, mask, is_causal=mask is None, enable_gqa=True
        )
        return self.o_proj(output.transpose(1, 2).reshape(*hidden_states.shape[:-1], -1)), None


class FastInHalf(OwnAttention):
    """A causal kernel in half precision, masks in float32."""

    def own_mask(self, mask, query):
        return None if query.dtype in {torch.float16, torch.bfloat16} else mask


class Near(OwnAttention):
    """Sees some columns back, which no config names."""

    def own_mask(self, mask, query):
        back = torch.arange(query.shape[2])[:, None] - torch.arange(query.shape[2])
        seen = (back >= 0) & (back < 150)
        return seen if mask is None else mask & seen


class Documents(Qwen2Model):
    """Attention stays within a document, which an end of text ends."""

    def forward(self, input_ids=None, attention_mask=None, **rest):
        if attention_mask is None or attention_mask.ndim == 2:
            ends = (input_ids == self.config.eos_token_id).long()
            document = ends.cumsum(1) - ends
            same = document[:, :, None] == document[:, None, :]
            attention_mask = (same & torch.ones(same.shape[1:], dtype=torch.bool).tril())[:, None]
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **rest)


def canon():
    model = tiny_model()
    for layer in model.model.layers:
        layer.input_layernorm = Canon(layer.input_layernorm)
    return model


def with_attention(kind):
    model = tiny_model()
    for number, layer in enumerate(model.model.layers):
        attention = kind(model.config, number)
        attention.load_state_dict(layer.self_attn.state_dict())
        layer.self_attn = attention
    return model


def documents():
    model = tiny_model()
    inner = Documents(model.config)
    inner.load_state_dict(model.model.state_dict())
    model.model = inner
    return model


class Large(torch.nn.Module):
    """A causal convolution over all channels, of more weights than are moved of one."""

    def __init__(self, inner):
        """Put it before a module."""
        super().__init__()
        self.inner, self.conv = inner, torch.nn.Conv1d(640, 640, 3)
        self.conv.weight.data.zero_()
        self.conv.weight.data[:, :, -1] = torch.eye(640)

    def forward(self, states):
        padded = torch.nn.functional.pad(states.transpose(1, 2), (2, 0))
        return self.inner(self.conv(padded).transpose(1, 2))


def large_identity():
    model = tiny_model(hidden_size=640, num_hidden_layers=1)
    model.model.layers[0].mlp = Large(model.model.layers[0].mlp)
    return model


class Columns(torch.nn.Module):
    """Adds a little that depends on the column."""

    def __init__(self, inner):
        """Put it before a module."""
        super().__init__()
        self.inner, self.gate = inner, torch.nn.Parameter(torch.zeros(()))

    def forward(self, states):
        places = torch.arange(states.shape[1], device=states.device)[:, None] / 100
        return self.inner(states + self.gate * torch.sin(places + torch.arange(states.shape[2])))


def columns():
    model = tiny_model(initializer_range=0.05)
    model.model.layers[0].mlp = Columns(model.model.layers[0].mlp)
    return model


@pytest.mark.parametrize(
    "make",
    [canon, large_identity, columns, lambda: with_attention(FastInHalf), lambda: with_attention(Near), documents],
    ids=[
        "begins as the identity",
        "a large block that does",
        "columns behind a gate of 0",
        "another kernel in half precision",
        "columns that no config names",
        "ends of texts",
    ],
)
def test_what_shows_only_later_is_seen_at_once(make):
    """Each is right on a plain random group in float32, and wrong in packed rows of training."""
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert not check_packing(model, max_length=64, token_budget=256).grouped
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("adapters", [None, LoraConfig(r=2, target_modules=["q_proj"])], ids=["full", "LoRA"])
def test_weights_that_a_training_pass_changes_are_refused(tmp_path, adapters):
    """As Gemma 3n clips some; the reference would be that of the changed model, which no adapter shows."""
    model = tiny_model()
    gate = model.model.layers[0].mlp.gate_proj

    def normalise(module, args):
        if module.training:
            module.weight.data.div_(module.weight.data.norm(dim=1, keepdim=True))

    gate.register_forward_pre_hook(normalise)
    with pytest.raises(PersodpoError, match=r"changes .*layers.0.mlp.gate_proj.*weight in a training pass"):
        grouped(tmp_path, model=model, peft_config=adapters)


def test_a_copy_of_a_model_that_a_trainer_has_is_trained_as_itself(tmp_path):
    """Its forward pass is still that of the original, by TRL's doing and by ours."""
    for number, first in enumerate((stock, grouped)):
        old = first(tmp_path / f"first-{number}", max_steps=1)
        copied, fresh = copy.deepcopy(old.model), tiny_model()
        fresh.load_state_dict(copied.state_dict())
        with torch.no_grad():
            for weight in old.model.parameters():
                weight.mul_(1.5)
        ours = trained(grouped(tmp_path / f"ours-{number}", model=copied, ref_model=copy.deepcopy(copied), max_steps=2))
        theirs = trained(stock(tmp_path / f"theirs-{number}", model=fresh, max_steps=2, precompute_ref_log_probs=True))
        assert logs(ours, "loss") == pytest.approx(logs(theirs, "loss"), abs=1e-5)


def test_statistics_of_the_batch_are_refused(tmp_path):
    class PowerNorm(torch.nn.Module):
        def __init__(self, in_place):
            super().__init__()
            self.in_place = in_place
            self.register_buffer("phi", torch.ones(32))

        def forward(self, states):
            if self.training and self.in_place:
                self.phi.mul_(0.9).add_(states.detach().pow(2).mean((0, 1)), alpha=0.1)
            elif self.training:
                self.phi = 0.9 * self.phi + 0.1 * states.detach().pow(2).mean((0, 1))
            return states / self.phi.sqrt()

    for in_place in (True, False):
        model = tiny_model()
        model.model.norm = PowerNorm(in_place)
        with pytest.raises(PersodpoError, match=r"changes model\.norm\.phi in training"):
            grouped(tmp_path, model=model)
        assert torch.equal(model.model.norm.phi, torch.ones(32))
    model = tiny_model()
    model.model.norm = torch.nn.Sequential(model.model.norm, Swapped(torch.nn.BatchNorm1d(32)))
    with pytest.raises(PersodpoError, match="while it trains"):
        grouped(tmp_path, model=model)


def test_tokens_that_mix_in_training_alone_are_refused(tmp_path):
    class Mixing(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, states):
            mixed = states + 0.1 * states.cumsum(1) if self.training else states
            return self.inner(mixed)

    model = tiny_model()
    model.model.layers[0].mlp = Mixing(model.model.layers[0].mlp)
    with pytest.raises(PersodpoError, match="while it trains"):
        grouped(tmp_path, model=model)


class _OwnLoss(torch.autograd.Function):
    """Adds a loss in the backward pass, as routers do that balance their experts by themselves."""

    @staticmethod
    def forward(ctx, states, loss):
        ctx.shape = loss.shape
        return states

    @staticmethod
    def backward(ctx, gradient):
        return gradient, torch.ones(ctx.shape, dtype=gradient.dtype)


class Balanced(torch.nn.Module):
    """Wraps a module; its own loss counts all tokens of a pass together."""

    def __init__(self, inner):
        """Wrap it."""
        super().__init__()
        self.inner = inner

    def forward(self, states):
        """Change no value."""
        return self.inner(_OwnLoss.apply(states, states.mean((0, 1)).square().sum()))


class Detached(Balanced):
    """Lets no gradient through the first half of the columns."""

    def forward(self, states):
        """Change no value."""
        half = states.shape[1] // 2
        return self.inner(torch.cat([states[:, :half].detach(), states[:, half:]], 1))


class Shifted(Balanced):
    """Sees the column before its own, in training alone; no response moves another by it."""

    def forward(self, states):
        """Mix tokens."""
        return self.inner(states + states.roll(2, 1) if self.training else states)


class Faint(Balanced):
    """Its own loss is small, as routers' are."""

    def forward(self, states):
        """Change no value."""
        return self.inner(_OwnLoss.apply(states, 1e-6 * states.mean((0, 1)).square().sum()))


@pytest.mark.parametrize(("wrapper", "fault"), [
    (Balanced, "other gradients"), (Faint, "where the loss is 0"), (Detached, "other gradients"),
    (Shifted, "while it trains"),
])  # fmt: skip
def test_what_shows_in_training_alone_is_refused(tmp_path, wrapper, fault):
    adapted = get_peft_model(tiny_model().bfloat16(), LoraConfig(target_modules=["q_proj"]))
    for model in (tiny_model(), adapted):
        layer = model.get_decoder().layers[0]
        layer.mlp = wrapper(layer.mlp)
        with pytest.raises(PersodpoError, match=fault):
            grouped(tmp_path, model=model)


class Penalised(Balanced):
    """Adds a penalty of its weights in each backward pass."""

    def forward(self, states):
        """Change no value."""
        return self.inner(_OwnLoss.apply(states, self.inner.gate_proj.weight.square().sum()))


class Gated(Balanced):
    """Mixes tokens in training alone, behind a gate that begins at zero."""

    def __init__(self, inner):
        """Wrap it."""
        super().__init__(inner)
        self.gate = torch.nn.Parameter(torch.zeros(()))

    def forward(self, states):
        """Mix tokens."""
        return self.inner(states + self.gate * states.roll(1, 1) if self.training else states)


@pytest.mark.parametrize(("wrapper", "fault", "dropout"), [
    (Penalised, "where the loss is 0", 0.0), (Gated, "while it trains", 0.0), (Shifted, "while it trains", 1e-3),
])  # fmt: skip
def test_what_hides_in_training_is_refused(tmp_path, wrapper, fault, dropout):
    """A penalty that no embedding shows, a gate near zero, and noise that hides what it stands beside."""
    model = tiny_model(initializer_range=0.05)
    for layer in model.model.layers:
        layer.mlp, layer.self_attn.attention_dropout = wrapper(layer.mlp), dropout
    with pytest.raises(PersodpoError, match=fault):
        grouped(tmp_path, model=model)


def test_a_reference_is_held_in_evaluation_alone(tmp_path):
    reference = tiny_model()
    reference.model.layers[0].mlp = Shifted(reference.model.layers[0].mlp)
    assert grouped(tmp_path, ref_model=reference).packing.grouped


def test_what_cannot_be_held_is_said(tmp_path):
    """Hooks on weights see micro-batches; embeddings that are not those of the model show no gradient."""
    model = tiny_model()
    model.lm_head.weight.register_hook(lambda gradient: gradient.clamp(-1, 1))
    with pytest.warns(UserWarning, match="have gradient hooks"):
        grouped(tmp_path, model=model)
    model = tiny_model()
    model.get_input_embeddings = lambda: torch.nn.Embedding(64, 32)
    with pytest.warns(UserWarning, match="could not be held against plain passes in training mode"):
        check_packing(model, max_length=64)


class Swapped(torch.nn.Module):
    """A module that takes channels first."""

    def __init__(self, inner):
        """Wrap it."""
        super().__init__()
        self.inner = inner

    def forward(self, states):
        return self.inner(states.transpose(1, 2)).transpose(1, 2)


def test_noise_that_no_module_draws_is_said(tmp_path, recwarn):
    for dropout in (0.0, 0.3):
        assert not any("draws noise in training" in str(warning.message) for warning in recwarn)
        model = tiny_model()
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = dropout
        grouped(tmp_path, model=model)
    assert any("draws noise in training" in str(warning.message) for warning in recwarn)


def test_quantised_weights_have_the_tolerance_of_half_precision():
    model = tiny_model()
    exact = check_packing(model, max_length=64).tolerance
    model.is_loaded_in_8bit = True
    assert check_packing(model, max_length=64).tolerance > 10 * exact


def test_weights_that_a_model_scales_for_evaluation_come_back():
    sizes = {"num_hidden_layers": 4, "rescale_every": 2, "attention_hidden_size": 32, "context_length": 256}
    model = architecture("rwkv", "eager", sizes).train()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    check_models(model, None, max_length=64, token_budget=128, aux_loss=False)
    model(input_ids=torch.tensor([[3, 4, 5]]))  # scales back what evaluation scaled
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_ends_beyond_the_vocabulary_are_left_out_of_the_random_text():
    model = tiny_model()
    model.config.bos_token_id, model.config.eos_token_id = 151_643, [1, 151_645]
    assert check_packing(model, max_length=64, token_budget=128).grouped


def test_a_model_that_changes_itself_by_what_it_reads_is_refused(tmp_path):
    """BigBird takes full attention for good once it has read a short text."""
    sizes = {"attention_type": "block_sparse", "block_size": 2, "num_random_blocks": 1, "is_decoder": True}
    model = architecture("big_bird", "eager", sizes | {"hidden_size": 32})
    ids = torch.arange(5, 55)[None]
    before = model(input_ids=ids).logits
    with pytest.raises(PersodpoError, match=r"changes itself by the texts that it reads \(attention_type\)"):
        check_packing(model, max_length=64)
    assert torch.equal(model(input_ids=ids).logits, before)
    full = architecture("big_bird", "eager", sizes | {"attention_type": "original_full"})
    assert check_packing(full, max_length=64).difference < 1e-4


def test_every_token_that_ends_texts_stands_in_the_random_text():
    model = tiny_model()
    model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id = 5, [1, 3, 4, 6], 2
    (first, *_), _ = random_groups(model, 64, 128)
    for tokens in (first.prompt, first.responses[0]):
        assert {5, 1, 3, 4} <= set(tokens)


class _Clamp(torch.autograd.Function):
    """Clamps what goes back through it."""

    @staticmethod
    def forward(ctx, states):
        return states.view_as(states)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clamp(-2e-3, 2e-3)


def test_gradients_that_are_clamped_inside_are_refused(tmp_path):
    """A response of several pairs has one gradient here, of their sum."""
    clamped, hooked = tiny_model(), tiny_model()
    clamped.model.norm.register_forward_hook(lambda _, into, out: _Clamp.apply(out))
    hooked.model.layers[1].mlp.up_proj.register_full_backward_hook(
        lambda _, into, out: tuple(one if one is None else one.clamp(-1e-3, 1e-3) for one in into)
    )
    for model in (clamped, hooked):
        with pytest.raises(PersodpoError, match="not in proportion to the loss"):
            grouped(tmp_path, model=model)


def test_a_vocabulary_of_six_and_statistics_that_text_never_reaches(tmp_path):
    """Neither fails, nor is refused: a frozen tower of another medium may hold anything."""
    tiny = tiny_model(vocab_size=6)
    check_models(tiny, None, max_length=16, token_budget=64, aux_loss=False)
    model = tiny_model()
    model.tower = torch.nn.BatchNorm2d(3)
    model.register_buffer("scale", torch.tensor([math.nan]))
    assert grouped(tmp_path, model=model).packing.grouped
