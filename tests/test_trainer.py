"""The trainer against stock TRL, step by step, and everything its user expects to go on working."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny import PAIRS_A_PROMPT, TINY, grouped, logs, stock, tiny_model, tiny_pairs, tiny_tokenizer, trained
from transformers import AutoModelForCausalLM, Phi3Config, Phi3ForCausalLM, TrainerCallback
from trl import DPOConfig
from trl.trainer.callbacks import SyncRefModelCallback

from persodpo.errors import PersodpoError
from persodpo.files import versions
from persodpo.training.guard import check_packing
from persodpo.training.trainer import GroupedDPOTrainer

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
LOG_2 = pytest.approx(math.log(2), abs=1e-6)

pytestmark = pytest.mark.usefixtures("one_thread")


def furthest(one, other) -> float:
    """Return the largest difference of a weight."""
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


def drift(one, other) -> float:
    """Return how far apart two models ended, relative to how far they went from where both began.

    Single weights are no measure under Adam: where a gradient is zero but for rounding, as that of a key's bias, Adam
    takes steps of the learning rate in the direction of the rounding.
    """
    start, mine, theirs = (
        torch.cat([weight.flatten() for weight in model.state_dict().values()]) for model in (tiny_model(), one, other)
    )
    return float((mine - theirs).norm() / (theirs - start).norm())


def uneven(*counts: int) -> Dataset:
    """Prompts with so many pairs each."""
    return Dataset.from_list([row for seed, count in enumerate(counts) for row in tiny_pairs(1, 1, count, seed=seed)])


def changed(dataset: Dataset, **columns) -> Dataset:
    for name, values in columns.items():
        dataset = dataset.remove_columns([name]).add_column(name, values)
    return dataset


@pytest.mark.parametrize(
    "changes",
    [
        {"max_steps": 20},
        {"loss_type": ["hinge"], "beta": 0.5, "pad_to_multiple_of": 8},
        {"loss_type": ["robust"], "label_smoothing": 0.1, "gradient_checkpointing": True},
        {
            "loss_type": ["ipo"],
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": True},
        },
        {"max_length": 11},
        {"max_grad_norm": 0.0, "optim": "sgd", "learning_rate": 0.05, "dataloader_num_workers": 1},
        {"peft_config": LORA},
        {"peft_config": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"])},
    ],
    ids=", ".join,
)
def test_same_losses_gradients_and_weights_as_stock_trl(tmp_path, changes):
    """The same step partition, fp32; the first loss is log 2 under the losses for which it is."""
    changes = {"max_steps": 6} | changes
    ours, theirs = (trained(make(tmp_path / make.__name__, **changes)) for make in (grouped, stock))
    assert len(logs(ours)) == changes["max_steps"]
    assert logs(ours) == pytest.approx(logs(theirs), abs=1e-4)
    assert logs(ours, "grad_norm") == pytest.approx(logs(theirs, "grad_norm"), rel=1e-4)
    for key in ("rewards/margins", "rewards/chosen", "logps/rejected", "rewards/accuracies"):
        # At the first step both sides are at the reference: which is ahead is rounding.
        assert logs(ours, key)[1:] == pytest.approx(logs(theirs, key)[1:], abs=2e-3), key
    if "peft_config" in changes:
        assert logs(ours)[0] == LOG_2
        kept = ("lora", "modules_to_save")
        learned = [name for name, weight in ours.model.named_parameters() if weight.requires_grad]
        assert learned
        assert all(any(part in name for part in kept) for name in learned)
    else:
        assert drift(ours.model, theirs.model) < (1e-5 if changes.get("optim") == "sgd" else 2e-3)


STEP = Dataset.from_list([row for k in range(8) for row in tiny_pairs(1, 1 + k % 3, 1 + k % 4, seed=k)])


@pytest.mark.parametrize(
    ("dataset", "changes", "pairs"),
    [
        (STEP, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, len(STEP)),
        (tiny_pairs(5), {"max_steps": 4}, 24),
        (tiny_pairs(24, 1, 1), {"max_steps": 4}, 4),
    ],
    ids=["accumulated, 1 to 12 pairs a prompt", "an uneven last step", "no cross product"],
)
def test_each_step_is_one_mean_over_its_pairs(tmp_path, dataset, changes, pairs):
    ours = trained(grouped(tmp_path / "a", dataset, **changes))
    steps = {"max_steps": changes["max_steps"]} if "max_steps" in changes else {}
    theirs = trained(stock(tmp_path / "b", dataset, per_device_train_batch_size=pairs, **steps))
    assert logs(ours) == pytest.approx(logs(theirs), abs=1e-5)
    assert drift(ours.model, theirs.model) < 2e-3


def test_canaries_of_the_weights(tmp_path):
    """The first loss is the mean weight times log 2, and every weight reaches its pair.

    Equal scores are plain DPO at half weight, or scaled, plain DPO; weight 0 gives no gradient; permuted scores give another
    loss; large scores are subtracted before they are rounded.
    """
    dataset = tiny_pairs(12)
    count = len(dataset)
    weighted = trained(grouped(tmp_path / "a", dataset, weighting="sigmoid"))
    rows = dataset[: 4 * PAIRS_A_PROMPT]
    margins = [c - r for c, r in zip(rows["score_chosen"], rows["score_rejected"], strict=True)]
    weight = sum(1 / (1 + math.exp(-margin)) for margin in margins) / len(margins)
    assert logs(weighted)[0] == pytest.approx(weight * math.log(2), abs=1e-6)
    assert logs(weighted, "weights")[0] == pytest.approx(weight, abs=1e-6)
    plain = trained(grouped(tmp_path / "b", dataset))
    assert logs(plain)[0] == LOG_2
    half = changed(dataset, score_chosen=[0.5] * count, score_rejected=[0.5] * count)
    equal = trained(grouped(tmp_path / "c", half, weighting="sigmoid", max_grad_norm=0.0, optim="sgd", max_steps=1))
    assert logs(equal)[0] == pytest.approx(0.5 * math.log(2), abs=1e-6)
    scaled = trained(grouped(tmp_path / "d", half, weighting="sigmoid", scale_weights=True))
    assert logs(scaled) == pytest.approx(logs(plain), abs=1e-6)
    assert furthest(scaled.model, plain.model) < 1e-6
    nothing = changed(dataset, score_chosen=[-1e4] * count, score_rejected=[0.0] * count)
    none = trained(grouped(tmp_path / "e", nothing, weighting="sigmoid", max_steps=1))
    assert logs(none, "grad_norm") == [0.0]
    assert furthest(none.model, tiny_model()) == 0.0
    backwards = changed(dataset, **{side: dataset[side][::-1] for side in ("score_chosen", "score_rejected")})
    permuted = trained(grouped(tmp_path / "f", backwards, weighting="sigmoid"))
    assert logs(permuted)[0] != pytest.approx(logs(weighted)[0], abs=1e-4)
    assert furthest(permuted.model, weighted.model) > 1e-4
    large = changed(dataset, score_chosen=[1e9 + 0.5] * count, score_rejected=[1e9] * count)
    close = grouped(tmp_path / "g", large, weighting="sigmoid")
    assert close.train_dataset[0]["weights"] == pytest.approx([1 / (1 + math.exp(-0.5))] * PAIRS_A_PROMPT)


def test_evaluation_is_the_mean_over_pairs_under_the_name_that_was_asked_for(tmp_path):
    """Prompts with 1, 12 and 2 pairs, one a batch; named sets; another prefix; stock TRL in one batch."""
    sets = {"a": uneven(1, 12, 2), "b": tiny_pairs(5, seed=3)}
    ours = trained(grouped(tmp_path / "a", eval_dataset=sets, per_device_eval_batch_size=1))
    theirs = trained(stock(tmp_path / "b", eval_dataset=sets, per_device_eval_batch_size=30))
    mine, expected = ours.evaluate(), theirs.evaluate()
    for name in sets:
        assert mine[f"eval_{name}_loss"] == pytest.approx(expected[f"eval_{name}_loss"], abs=1e-4)
    assert mine["eval_b_rewards/margins"] == pytest.approx(logs(theirs, "eval_rewards/margins")[-1], abs=1e-3)
    assert "eval_loss" not in mine
    assert mine["eval_a_loss"] != pytest.approx(mine["eval_b_loss"], abs=1e-3)
    named = ours.evaluate(ours.eval_dataset["a"], metric_key_prefix="test")
    assert named["test_loss"] == mine["eval_a_loss"]
    assert not {key for key in named if key.startswith("eval")}
    apart = [mine["eval_a_loss"], mine["eval_b_loss"]]
    joined = concatenate_datasets(list(ours.eval_dataset.values()))
    ours.eval_dataset = joined
    assert ours.evaluate()["eval_loss"] == pytest.approx((15 * apart[0] + 30 * apart[1]) / 45, abs=1e-6)
    losses = [ours.predict(joined.select([row])).metrics["test_loss"] for row in (3, 4)]
    twice = ours.predict(joined.select([3, 3, 3, 4])).metrics["test_loss"]
    assert twice == pytest.approx((3 * losses[0] + losses[1]) / 4, abs=1e-6)
    with pytest.raises(PersodpoError, match="predict takes a dataset of this trainer"):
        ours.predict(sets["a"])


def test_the_best_model_is_chosen_by_the_set_that_was_named(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 6,
                "load_best_model_at_end": True, "metric_for_best_model": "a_loss", "learning_rate": 0.02}  # fmt: skip
    trainer = trained(grouped(tmp_path, eval_dataset={"a": uneven(1, 12, 2), "b": tiny_pairs(5, seed=3)}, **settings))
    losses = dict(zip((2, 4, 6), logs(trainer, "eval_a_loss"), strict=True))
    best = min(losses, key=losses.get)
    assert trainer.state.best_metric == losses[best]
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert trainer.evaluate()["eval_a_loss"] == pytest.approx(losses[best], abs=1e-6)


def test_a_new_dataset_is_evaluated_while_its_reference_can_be_had(tmp_path):
    """A reference that was trained, or changed by hand, is neither used nor cached."""
    new, cache = tiny_pairs(4, seed=8), {"reference_cache": str(tmp_path / "cache")}
    kept = grouped(tmp_path / "a", tiny_pairs(8), ref_model=tiny_model())
    whole = grouped(tmp_path / "b", tiny_pairs(8), eval_dataset=new)
    lora = grouped(tmp_path / "c", tiny_pairs(8), peft_config=LORA)
    biased = LoraConfig(r=4, target_modules=["q_proj"], bias="all")
    biases = grouped(tmp_path / "d", tiny_pairs(8), peft_config=biased, max_steps=2, **cache)
    assert whole.evaluate(new)["eval_loss"] == LOG_2
    for trainer in (kept, whole, lora, biases):
        trainer.train()
    assert kept.evaluate(new)["eval_loss"] == pytest.approx(whole.evaluate()["eval_loss"], abs=1e-5)
    assert lora.evaluate(new)["eval_loss"] != LOG_2
    files = len(list((tmp_path / "cache").glob("*")))
    by_hand = grouped(tmp_path / "e", tiny_pairs(8))
    by_hand.model.load_state_dict(tiny_model(seed=9).state_dict())
    for trainer in (whole, biases, by_hand):
        with pytest.raises(PersodpoError, match=r"weights have changed; pass ref_model"):
            trainer.evaluate(new)
    assert len(list((tmp_path / "cache").glob("*"))) == files
    with pytest.raises(PersodpoError, match="is a stream"):
        kept.evaluate(new.to_iterable_dataset())


def test_what_a_dataset_shows_is_what_is_trained(tmp_path):
    """Transforms applied, hidden columns left out, values of torch as plain ones."""

    def altered(rows):
        cut = [" ".join(text.split()[:2]) for text in rows["chosen"]]
        return dict(rows) | {"chosen": cut, "score_chosen": [10 * score for score in rows["score_chosen"]]}

    def columns(name, dataset, weighting="sigmoid"):
        prepared = grouped(tmp_path / name, dataset, weighting=weighting).train_dataset
        return [prepared[column][:] for column in ("prompt_ids", "response_ids", "weights", "reference")]

    raw = columns("raw", tiny_pairs())
    shown = columns("a", tiny_pairs().with_transform(altered))
    assert shown == columns("b", tiny_pairs().map(altered, batched=True))
    assert shown[1] != raw[1]
    assert shown[2] != raw[2]
    assert columns("c", tiny_pairs().with_format("torch")) == raw
    whole = tiny_pairs().map(lambda row: {side: row["prompt"] + row[side] for side in ("chosen", "rejected")})
    sides = ["chosen", "rejected"]
    hidden = columns("d", whole.with_format(columns=sides), "none")
    assert hidden == columns("e", whole.select_columns(sides), "none")


def test_half_precision_stays_near_single(tmp_path):
    """bf16 autocast: losses within 0.02, also of the same model trained again, and against a reference of its own."""
    full = trained(grouped(tmp_path / "a", max_steps=6))
    model = tiny_model()
    half = trained(grouped(tmp_path / "b", model=model, max_steps=6, bf16=True))
    assert logs(half) == pytest.approx(logs(full), abs=0.02)
    assert logs(half)[0] == pytest.approx(math.log(2), abs=1e-3)
    assert logs(half) != logs(full)
    again = trained(grouped(tmp_path / "c", model=model, bf16=True, max_steps=2))
    assert logs(again)[0] == pytest.approx(math.log(2), abs=2e-2)
    assert again.state.total_flos > 0
    settings = {"bf16": True, "max_steps": 2}
    ours = trained(grouped(tmp_path / "d", ref_model=tiny_model(seed=5), **settings))
    theirs = trained(stock(tmp_path / "e", ref_model=tiny_model(seed=5), **settings))
    assert ours.packing.grouped
    assert logs(ours) == pytest.approx(logs(theirs), abs=0.02)
    assert logs(ours)[0] != pytest.approx(math.log(2), abs=1e-3)


def test_pairs_that_are_left_out_are_said_and_not_weighed(tmp_path):
    """Pairs of equal sides, which are left out, weigh 0.5; the others 0.73. A set to evaluate may be called train."""
    rows = tiny_pairs(4).to_list()
    for number, row in enumerate(rows):
        row |= {"score_chosen": 1.0, "score_rejected": 0.0}
        if number % 2:
            row |= {"rejected": row["chosen"], "score_chosen": 0.0}
    settings = {"weighting": "sigmoid", "scale_weights": True, "max_steps": 1}
    with pytest.warns(UserWarning, match=r"train dataset, left out pairs: 12 \(chosen equals rejected\); 12 stay"):
        trainer = grouped(tmp_path, Dataset.from_list(rows), eval_dataset={"train": tiny_pairs(4)}, **settings)
    assert {name: sum(skipped.values()) for name, skipped in trainer.skipped.items()} == {"train": 12, "eval train": 0}
    assert [weight for row in trainer.train_dataset["weights"] for weight in row] == pytest.approx([1.0] * 12)
    trainer.train()
    assert logs(trainer)[0] == LOG_2
    trainer.create_model_card("mine")
    card = (tmp_path / "README.md").read_text()
    for part in (versions()["persodpo"], "all responses of a prompt in one row", "sigmoid, scaled to mean 1",
                 "12 (chosen equals rejected)"):  # fmt: skip
        assert part in card
    long = tiny_pairs(3).to_list()
    long[0]["prompt"] = "w1 " * 70
    with pytest.warns(UserWarning, match=r"left out pairs: 1 \(prompt as long as max_length\); 17 stay"):
        grouped(tmp_path / "b", Dataset.from_list(long))


def test_a_group_larger_than_the_budget_is_split_and_trains_the_same(tmp_path):
    dataset = tiny_pairs(3, 5, 6)
    settings = {"max_steps": 2, "per_device_train_batch_size": 3}
    whole, split = (trained(grouped(tmp_path / str(n), dataset, token_budget=n, **settings)) for n in (1000, 40))
    batch = next(iter(split.get_train_dataloader()))["batch"]
    assert max(rows.input_ids.numel() for rows in batch.rows) <= 40
    assert batch.pairs == 90
    assert logs(split) == pytest.approx(logs(whole), abs=1e-5)
    assert logs(split, "grad_norm") == pytest.approx(logs(whole, "grad_norm"), rel=1e-4)
    assert drift(split.model, whole.model) < 2e-3


def test_a_loss_that_is_no_number_ends_the_run(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 12, "max_grad_norm": 0.0}
    trainer = grouped(tmp_path / "a", learning_rate=1e3, optim="sgd", **settings)
    with pytest.raises(PersodpoError, match=r"(loss is (nan|inf)|weight is not a number) .*step \d+"):
        trainer.train()
    saved = sorted((tmp_path / "a").glob("checkpoint-*"))
    weights = [load_file(folder / "model.safetensors") for folder in saved]
    assert all(torch.isfinite(weight).all() for tensors in weights for weight in tensors.values())
    assert all(math.isfinite(loss) for loss in logs(trainer))
    damaged = tiny_model()
    damaged.model.layers[0].mlp.up_proj.weight.data[0, 0] = math.nan
    with pytest.raises(PersodpoError):
        grouped(tmp_path / "b", model=damaged)


def scaled_attention():
    model = tiny_model()
    for layer in model.model.layers:
        layer.self_attn.scaling *= 0.5
    return model


def of_adapters(active: str):
    torch.manual_seed(1)
    model = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    model.add_adapter("b", LoraConfig(r=4, target_modules=["v_proj"], init_lora_weights=False))
    model.set_adapter(active)
    return model


def test_references_are_cached_under_all_that_they_depend_on(tmp_path):
    """Weights, lengths, config, and what none of them tells: a scale, the active adapter. A damaged file is made anew."""
    folder, dataset = tmp_path / "cache", tiny_pairs(4)
    turned = tiny_model(rope_parameters={"rope_type": "default", "rope_theta": 10.0})
    turned.load_state_dict(tiny_model().state_dict())
    values = []
    for number, changes in enumerate((
        {}, {"model": tiny_model(seed=1)}, {"max_length": 9}, {"model": turned}, {"model": scaled_attention()},
        {"ref_model": of_adapters("default")}, {"ref_model": of_adapters("b")},
    )):  # fmt: skip
        trainer = grouped(tmp_path / str(number), dataset, reference_cache=str(folder), max_steps=1, **changes)
        values.append(trainer.train_dataset["reference"][:])
        assert len(list(folder.glob("*.safetensors"))) == number + 1
        if "ref_model" not in changes:
            assert logs(trained(trainer))[0] == LOG_2
    assert values[5] != values[6]
    stamps = {path: path.stat().st_mtime_ns for path in folder.glob("*")}
    again = grouped(tmp_path / "again", dataset, reference_cache=str(folder))
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*")} == stamps
    assert again.train_dataset["reference"][:] == values[0]
    for path in stamps:
        path.write_bytes(b"cut off")
    damaged = grouped(tmp_path / "damaged", dataset, reference_cache=str(folder))
    assert damaged.train_dataset["reference"][:] == values[0]
    # A hook on a rare token shows in no key and not in what the model makes of a random text.
    bare, hooked = (tiny_model(vocab_size=4000) for _ in range(2))
    token = Counter(token for row in again.train_dataset["prompt_ids"] for token in row).most_common(1)[0][0]
    hooked.model.embed_tokens.register_forward_hook(
        lambda _, ids, vectors: torch.where((ids[0] == token)[..., None], 3 * vectors, vectors)
    )
    for model in (bare, hooked):
        trainer = grouped(tmp_path / "hooked", dataset, model=model, reference_cache=str(folder), max_steps=1)
        assert logs(trained(trainer))[0] == LOG_2


def test_adapters_that_come_with_a_model(tmp_path):
    """As reference they stay on; what the user froze of them stays frozen; folders of them are no model to train."""
    torch.manual_seed(1)
    reference = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    merged = copy.deepcopy(reference).merge_and_unload().requires_grad_(True)
    assert logs(trained(grouped(tmp_path / "a", model=merged, ref_model=reference, max_steps=1)))[0] == LOG_2
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, weight in model.named_parameters():
        weight.requires_grad_("lora_B" in name)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    first = trained(grouped(tmp_path / "b", model=model, max_steps=2))
    weights = {name: weight for name, weight in model.named_parameters() if name in before}
    moved = {name for name, weight in weights.items() if not torch.equal(weight, before[name])}
    assert moved
    assert all("lora_B" in name for name in moved)
    tiny_model().save_pretrained(tmp_path / "base")
    first.model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    first.save_model(str(tmp_path / "adapters"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapters")
    for extra in ({}, {"peft_config": LORA}):
        with pytest.raises(PersodpoError, match="or merge them into their base"):
            grouped(tmp_path / "c", model=loaded, **extra)


def test_several_active_adapters_stay_active(tmp_path):
    """The policy is what the model computed when it was handed over, in training as in evaluation."""
    torch.manual_seed(1)
    model = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    model.add_adapter("b", LoraConfig(r=4, target_modules=["k_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "b"])
    ids = torch.arange(5, 30)[None]
    before = model(input_ids=ids).logits
    trainer = grouped(tmp_path, model=model, max_steps=1)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert logs(trained(trainer))[0] != LOG_2  # TRL's reference is the first adapter alone


def test_the_users_own_config_is_taken_and_left_as_it_was(tmp_path, recwarn):
    @dataclass
    class Mine(DPOConfig):
        mine: int = 3
        weighting: str = "sigmoid"

    settings = {"max_steps": 1, "precompute_ref_batch_size": 3, "disable_dropout": False,
                "accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 2}}}  # fmt: skip
    args = Mine(str(tmp_path), **(TINY | settings))
    before = dict(vars(args)) | {"accelerator_config": copy.deepcopy(args.accelerator_config)}
    seen = []

    class Reads(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(args.mine)

    trainer = GroupedDPOTrainer(
        model=tiny_model(),
        args=args,
        train_dataset=tiny_pairs(4),
        processing_class=tiny_tokenizer(),
        callbacks=[Reads()],
    )
    for name in ("precompute_ref_log_probs=False", "precompute_ref_batch_size=3", "disable_dropout=False"):
        assert any(str(warning.message).startswith(name) for warning in recwarn), name
    trainer.train()
    assert seen == [3]
    assert dict(vars(args)) == before
    assert trainer.args.gradient_accumulation_steps == 2
    assert logs(trainer, "weights")[0] != 1.0


def test_resuming_is_bit_identical(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "train_sampling_strategy": "random"}
    whole = trained(grouped(tmp_path / "a", **settings))
    trained(grouped(tmp_path / "b", **(settings | {"max_steps": 3})))
    rest = grouped(tmp_path / "b", **settings)
    rest.train(resume_from_checkpoint=True)
    assert logs(rest)[-3:] == logs(whole)[-3:]
    assert furthest(rest.model, whole.model) == 0.0
    folder = tmp_path / "b" / "checkpoint-6"
    assert {"model.safetensors", "trainer_state.json"} <= {path.name for path in folder.iterdir()}
    assert not list(folder.glob("pytorch_model*"))
    assert (tmp_path / "b" / "README.md").exists()
    assert furthest(type(whole.model).from_pretrained(folder), whole.model) == 0.0


SCRIPT = """
import json, os, sys
sys.path.insert(0, {tests!r})
import torch
from accelerate.state import AcceleratorState, DistributedType
from tiny import make, tiny_pairs
from transformers import AutoModelForCausalLM
from persodpo.training.trainer import GroupedDPOConfig, GroupedDPOTrainer

torch.set_num_threads(1)
folder, model, way = sys.argv[1:]
batch = 4 if way == "one" else 2
extra = {{}} if way == "one" else {{"ddp_backend": "gloo"}}
if way == "fsdp":
    # accelerate shards on accelerators alone; torch shards on CPUs, too.
    init = AcceleratorState.__init__

    def sharded(self, *args, **kwargs):
        init(self, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin") or self.__dict__.get("fsdp_plugin")
        if plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin

    AcceleratorState.__init__ = sharded
    extra |= {{"fsdp": True, "fsdp_config": {{"transformer_layer_cls_to_wrap": ["Qwen2DecoderLayer"]}}}}
wrapped = set()

class Trainer(GroupedDPOTrainer):
    def training_step(self, model, *args):
        wrapped.add(type(model).__name__)
        return super().training_step(model, *args)

trainer = make(
    Trainer, GroupedDPOConfig, folder, model=AutoModelForCausalLM.from_pretrained(model, attn_implementation="sdpa"),
    eval_dataset=tiny_pairs(7, seed=9), per_device_train_batch_size=batch, per_device_eval_batch_size=batch, max_steps=6,
    token_budget=70, weighting="sigmoid", eval_on_start=True, **extra)
if way == "early":
    trainer.evaluate()
trainer.train()
after = trainer.evaluate()
trainer.save_model(folder)
trainer.accelerator.end_training()
history = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
if trainer.accelerator.is_main_process:
    print("RESULT" + json.dumps({{
        "wrapped": [*wrapped],
        "steps": [[e["loss"], e["grad_norm"], e["rewards/margins"], e["num_tokens"]] for e in history],
        "eval": [after["eval_loss"], after["eval_rewards/margins"]],
        "before": next(e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e)}}))
"""


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path):
    """Two gloo processes, half the prompts each: steps, evaluation with a last batch that is filled up, saved weights."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    tiny_model().save_pretrained(tmp_path / "model")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    ways = {"one": "Qwen2ForCausalLM", "ddp": "DistributedDataParallel", "fsdp": "FSDPQwen2ForCausalLM", "early": ""}
    results, weights = {}, {}
    for way in ways:
        command = [*([sys.executable] if way == "one" else launch), script, tmp_path / way, tmp_path / "model", way]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
        lines = [line for line in done.stdout.splitlines() if "RESULT" in line]
        if way == "early":
            # Transformers then leaves the model without a wrapper, and each process would train by itself.
            assert "eval_on_start" in done.stderr
            continue
        assert lines, done.stderr[-3000:]
        results[way] = json.loads(lines[-1].split("RESULT")[1])
        weights[way] = load_file(tmp_path / way / "model.safetensors")
    one = results["one"]
    assert len(one["steps"]) == 6
    for way in results:
        assert results[way]["wrapped"] == [ways[way]]
        for mine, theirs in zip(results[way]["steps"], one["steps"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-5)
        assert results[way]["eval"] == pytest.approx(one["eval"], abs=1e-5)
        assert results[way]["before"] == pytest.approx(one["before"], abs=1e-6)
        assert all(torch.allclose(weights[way][name], weight, atol=1e-4) for name, weight in weights["one"].items())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss_type": ["aot"]}, "'aot' is not computed on grouped rows"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]}, "One loss is trained"),
        ({"f_divergence_type": "js_divergence"}, "f_divergence_type='js_divergence' cannot be grouped"),
        ({"torch_compile": True}, "torch_compile=True cannot be grouped"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=5.0 cannot be grouped"),
        ({"weighting": "Sigmoid"}, "'Sigmoid'"),
        ({"token_budget": 0}, "token_budget is 0"),
        ({"train_sampling_strategy": "group_by_length"}, "group_by_length"),
        ({"ld_alpha": 0.5}, "ld_alpha=0.5 cannot be grouped"),
        ({"use_weighting": True}, "use_weighting=True cannot be grouped"),
        ({"truncation_mode": "keep_end"}, "truncation_mode='keep_end'"),
        ({"max_length": 3}, "no pair to train on"),
        ({"optim": "lomo"}, "optim='OptimizerNames.LOMO' steps in each backward pass"),
        ({"optim": "galore_adamw_layerwise", "optim_target_modules": ["q_proj"]}, "steps in each backward pass"),
        ({"ddp_static_graph": True}, "ddp_static_graph=True cannot be grouped"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches=True"),
        ({"callbacks": [SyncRefModelCallback(None, None)]}, "SyncRefModelCallback"),
    ],
)
def test_arguments_that_cannot_be_grouped_are_refused_by_name(tmp_path, changes, words):
    with pytest.raises(PersodpoError) as refused:
        grouped(tmp_path, **changes)
    assert words in str(refused.value)


@pytest.mark.parametrize("score", [math.nan, math.inf, None])
def test_a_score_that_is_no_number_is_refused_with_its_row(tmp_path, score):
    scores = tiny_pairs()["score_chosen"][:]
    broken = changed(tiny_pairs(), score_chosen=[*scores[:5], score, *scores[6:]])
    with pytest.raises(PersodpoError, match=rf"score_chosen of row 5 .* {score}"):
        grouped(tmp_path, broken, weighting="sigmoid")


def test_environments_datasets_and_models_that_do_not_fit_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")
    with pytest.raises(PersodpoError, match="ACCELERATE_DYNAMO_BACKEND"):
        grouped(tmp_path)
    monkeypatch.undo()
    trainer = grouped(tmp_path)
    with pytest.raises(PersodpoError, match="SyncRefModelCallback"):
        trainer.add_callback(SyncRefModelCallback(tiny_model(), trainer.accelerator))
    bare = tiny_pairs().remove_columns(["score_chosen"])
    with pytest.raises(PersodpoError, match="needs the columns score_chosen and score_rejected in the train dataset"):
        grouped(tmp_path, bare, weighting="sigmoid")
    pictures = tiny_pairs(2).add_column("image", [None] * 12)
    for name, datasets in {"train": (pictures, None), "eval": (bare, pictures)}.items():
        with pytest.raises(PersodpoError, match=f"The {name} dataset has images"):
            grouped(tmp_path, datasets[0], eval_dataset=datasets[1])
    with pytest.raises(PersodpoError, match="grouped already"):
        grouped(tmp_path, trainer.train_dataset)
    small, quantised = tiny_model(), tiny_model()
    small.resize_token_embeddings(40)
    with pytest.raises(PersodpoError, match="has no embedding"):
        grouped(tmp_path, model=small)
    # After an evaluation bitsandbytes would train them without gradients, and silently.
    quantised.is_loaded_in_4bit = True
    with pytest.raises(PersodpoError, match=r"4-bit weights on a CPU cannot be trained: .* load the model on a GPU"):
        grouped(tmp_path, model=quantised)


def test_a_beta_that_a_callback_changes_reaches_the_loss(tmp_path):
    class Rising(TrainerCallback):
        trainer = None

        def on_step_begin(self, args, state, control, **kwargs):
            self.trainer.beta = 0.1 * (1 + state.global_step)

    trainers = [grouped(tmp_path / "a"), stock(tmp_path / "b")]
    for trainer in trainers:
        rising = Rising()
        rising.trainer = trainer
        trainer.add_callback(rising)
        trainer.train()
    assert logs(trainers[0]) == pytest.approx(logs(trainers[1]), abs=1e-5)


def in_bf16(folder, **changes):
    return grouped(folder, bf16=True, per_device_train_batch_size=24, token_budget=4096, **changes)


@pytest.mark.parametrize("first", [stock, grouped])
def test_a_second_trainer_of_adapters_is_under_mixed_precision_as_the_first_was(tmp_path, first):
    model = trained(first(tmp_path / "a", peft_config=LORA, bf16=True)).model
    entry = trained(in_bf16(tmp_path / "b", model=model, weighting="none")).state.log_history[0]
    assert entry["loss"] == pytest.approx(math.log(2), abs=1e-6)  # policy and reference in one number type
    assert entry["rewards/accuracies"] == entry["rewards/chosen"] == 0


def test_adapters_go_on_a_model_that_was_trained_under_mixed_precision(tmp_path):
    base = trained(stock(tmp_path / "a", model=tiny_model(), ref_model=tiny_model(), bf16=True)).model
    plain, loaded = copy.deepcopy(base.state_dict()), tiny_model()
    loaded.load_state_dict(plain)
    torch.manual_seed(0)
    theirs = trained(stock(tmp_path / "b", model=get_peft_model(loaded, LORA)))
    torch.manual_seed(0)
    ours = trained(grouped(tmp_path / "c", model=get_peft_model(base, LORA)))
    assert logs(ours) == pytest.approx(logs(theirs), abs=2e-5)


def phi() -> torch.nn.Module:
    torch.manual_seed(0)
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    return Phi3ForCausalLM(Phi3Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, pad_token_id=2,
        num_key_value_heads=2, attn_implementation="sdpa", initializer_range=0.2, eos_token_id=1, bos_token_id=1,
        sliding_window=6, max_position_embeddings=2048, original_max_position_embeddings=128,
        rope_parameters=rope | {"original_max_position_embeddings": 128, "factor": 16.0},
    ))  # fmt: skip


def test_a_question_to_the_guard_does_not_change_how_a_trainer_computes(tmp_path):
    """Rows up to 64 tokens are grouped; asked about longer ones, the guard refuses, and once left other attention behind."""
    ours = grouped(tmp_path / "a", model=phi())
    assert ours.packing.grouped
    with pytest.raises(PersodpoError, match="log-probabilities"):
        check_packing(ours.model)
    theirs = trained(stock(tmp_path / "b", model=phi(), ref_model=phi()))
    assert logs(trained(ours)) == pytest.approx(logs(theirs), abs=2e-5)


def test_a_new_wider_dataset_is_evaluated_under_mixed_precision(tmp_path):
    small, wide = tiny_pairs(prompts=4), tiny_pairs(prompts=4, chosen=4, rejected=6, seed=1)
    ours, theirs = (
        make(tmp_path / make.__name__, small, bf16=True, ref_model=tiny_model(1), per_device_eval_batch_size=100)
        for make in (grouped, stock)
    )
    found, expected = (trained(trainer).evaluate(wide)["eval_loss"] for trainer in (ours, theirs))
    assert found == pytest.approx(expected, abs=5e-3)
    trainer = grouped(tmp_path / "c", small, peft_config=LORA, eval_dataset=small)
    both = trainer.evaluate({"own": trainer.eval_dataset, "new": wide})
    assert both["eval_own_loss"] == pytest.approx(both["eval_new_loss"]) == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize(("wide", "bf16"), [("lm_head", True), ("lm_head", False), ("norm", True)])
def test_weights_of_several_number_types_train_where_trl_trains_them(tmp_path, wide, bf16):
    def mixed():
        model = tiny_model(tie_word_embeddings=False).to(torch.bfloat16)
        for name, weight in model.named_parameters():
            if wide in name:
                weight.data = weight.data.float()
        return model

    changes = {"bf16": bf16, "learning_rate": 1e-2}
    ours = trained(grouped(tmp_path / "a", model=mixed(), token_budget=4096, **changes))
    theirs = trained(stock(tmp_path / "b", model=mixed(), ref_model=mixed(), **changes))
    assert logs(ours) == pytest.approx(logs(theirs), abs=2e-2)
