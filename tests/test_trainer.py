"""The trainer against stock TRL, step by step, and everything its user expects to go on working."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny import TINY, tiny_model, tiny_pairs, tiny_tokenizer
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import DPOConfig, DPOTrainer
from trl.trainer.callbacks import SyncRefModelCallback

from persodpo.errors import PersodpoError
from persodpo.runfolder import versions
from persodpo.training.trainer import GroupedDPOConfig, GroupedDPOTrainer

PAIRS_A_PROMPT = 6


pytestmark = pytest.mark.usefixtures("one_thread")


def grouped(folder, dataset=None, *, model=None, **changes) -> GroupedDPOTrainer:
    names = ("peft_config", "eval_dataset", "ref_model", "callbacks")
    extra = {name: changes.pop(name) for name in names if name in changes}
    settings = TINY | {"per_device_train_batch_size": 4, "max_steps": 20, "token_budget": 150} | changes
    return GroupedDPOTrainer(
        model=model or tiny_model(), args=GroupedDPOConfig(str(folder), **settings),
        train_dataset=dataset if dataset is not None else tiny_pairs(), processing_class=tiny_tokenizer(), **extra,
    )  # fmt: skip


def stock(folder, dataset=None, **changes) -> DPOTrainer:
    extra = {name: changes.pop(name) for name in ("peft_config", "eval_dataset") if name in changes}
    settings = TINY | {"per_device_train_batch_size": 4 * PAIRS_A_PROMPT, "max_steps": 20} | changes
    return DPOTrainer(
        model=tiny_model(), ref_model=None if "peft_config" in extra else tiny_model(),
        args=DPOConfig(str(folder), **settings), train_dataset=dataset if dataset is not None else tiny_pairs(),
        processing_class=tiny_tokenizer(), **extra,
    )  # fmt: skip


def logs(trainer, key: str = "loss") -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


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


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss_type": ["hinge"], "beta": 0.5},
        {"loss_type": ["robust"], "label_smoothing": 0.1},
        {"loss_type": ["ipo"]},
        {"pad_to_multiple_of": 8},
        {"gradient_checkpointing": True},
        {"max_length": 11},
        {"max_grad_norm": 0.0, "optim": "sgd", "learning_rate": 0.05},
    ],
    ids=str,
)
def test_same_losses_gradients_and_weights_as_stock_trl(tmp_path, changes):
    """Twenty steps on the same step partition, fp32."""
    ours, theirs = grouped(tmp_path / "a", **changes), stock(tmp_path / "b", **changes)
    ours.train()
    theirs.train()
    assert logs(ours) == pytest.approx(logs(theirs), abs=1e-4)
    assert logs(ours, "grad_norm") == pytest.approx(logs(theirs, "grad_norm"), rel=1e-4)
    for key in ("rewards/margins", "rewards/chosen", "logps/rejected", "rewards/accuracies"):
        # At the first step both sides are at the reference: which is ahead is rounding.
        assert logs(ours, key)[1:] == pytest.approx(logs(theirs, key)[1:], abs=2e-3), key
    assert drift(ours.model, theirs.model) < (1e-5 if changes.get("optim") == "sgd" else 2e-3)
    assert sum(ours.skipped["train"].__dict__.values()) == 0 or "max_length" in changes


def test_accumulation_counts_pairs_not_micro_batches(tmp_path):
    """Prompts with one pair and with twelve in one optimiser step: still one mean over its pairs."""
    uneven = Dataset.from_list([row for k in range(8) for row in tiny_pairs(1, 1 + k % 3, 1 + k % 4, seed=k)])
    step_pairs = sum((1 + k % 3) * (1 + k % 4) for k in range(8))
    ours = grouped(tmp_path / "a", uneven, per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=3)
    theirs = stock(tmp_path / "b", uneven, per_device_train_batch_size=step_pairs, max_steps=3)
    ours.train()
    theirs.train()
    assert logs(ours) == pytest.approx(logs(theirs), abs=1e-5)
    assert furthest(ours.model, theirs.model) < 1e-5


def test_an_uneven_last_step_is_a_mean_over_its_own_pairs(tmp_path):
    dataset = tiny_pairs(5)
    ours = grouped(tmp_path / "a", dataset, max_steps=4)
    theirs = stock(tmp_path / "b", dataset, max_steps=4)
    ours.train()
    theirs.train()
    assert logs(ours) == pytest.approx(logs(theirs), abs=1e-5)


def test_pairs_that_are_no_cross_product_train_as_stock(tmp_path):
    dataset = tiny_pairs(24, 1, 1)
    ours = grouped(tmp_path / "a", dataset, max_steps=5)
    theirs = stock(tmp_path / "b", dataset, per_device_train_batch_size=4, max_steps=5)
    ours.train()
    theirs.train()
    assert logs(ours) == pytest.approx(logs(theirs), abs=1e-5)
    assert furthest(ours.model, theirs.model) < 1e-5


def test_lora_has_its_base_model_as_reference(tmp_path):
    lora = {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), "max_steps": 6}
    ours, theirs = grouped(tmp_path / "a", **lora), stock(tmp_path / "b", **lora)
    ours.train()
    theirs.train()
    assert logs(ours) == pytest.approx(logs(theirs), abs=1e-4)
    assert logs(ours)[0] == pytest.approx(math.log(2), abs=1e-6)
    trained = [name for name, parameter in ours.model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora" in name for name in trained)


def test_a_given_reference_model_is_used(tmp_path):
    other = grouped(tmp_path / "a", ref_model=tiny_model(seed=5), max_steps=1)
    other.train()
    assert logs(other)[0] != pytest.approx(math.log(2), abs=1e-3)


@pytest.mark.parametrize(("weighting", "first"), [("none", 1.0), ("sigmoid", None)])
def test_the_first_loss_is_the_weight_times_log_two(tmp_path, weighting, first):
    dataset = tiny_pairs()
    trainer = grouped(tmp_path, dataset, weighting=weighting, max_steps=1)
    trainer.train()
    rows = dataset[: 4 * PAIRS_A_PROMPT]
    margins = [c - r for c, r in zip(rows["score_chosen"], rows["score_rejected"], strict=True)]
    weight = first or sum(1 / (1 + math.exp(-margin)) for margin in margins) / len(margins)
    assert logs(trainer)[0] == pytest.approx(weight * math.log(2), abs=1e-6)
    assert logs(trainer, "weights")[0] == pytest.approx(weight, abs=1e-6)


def scored(dataset: Dataset, chosen: list[float], rejected: list[float]) -> Dataset:
    return (
        dataset.remove_columns(["score_chosen", "score_rejected"])
        .add_column("score_chosen", chosen)
        .add_column("score_rejected", rejected)
    )


def test_canaries_of_the_weights(tmp_path):
    """Equal scores are plain DPO at half weight; weight 0 gives no gradient; permuted scores another loss."""
    dataset, count = tiny_pairs(), len(tiny_pairs())
    plain = grouped(tmp_path / "a", dataset, max_steps=3)
    equal = grouped(tmp_path / "b", scored(dataset, [0.5] * count, [0.5] * count), weighting="sigmoid", max_steps=3,
                    max_grad_norm=0.0, optim="sgd")  # fmt: skip
    scaled = grouped(tmp_path / "c", scored(dataset, [0.5] * count, [0.5] * count), weighting="sigmoid", scale_weights=True,
                     max_steps=3)  # fmt: skip
    none = grouped(tmp_path / "d", scored(dataset, [-1e4] * count, [0.0] * count), weighting="sigmoid", max_steps=1)
    permuted = grouped(tmp_path / "e", scored(dataset, dataset["score_chosen"][::-1], dataset["score_rejected"][::-1]),
                       weighting="sigmoid", max_steps=3)  # fmt: skip
    weighted = grouped(tmp_path / "f", dataset, weighting="sigmoid", max_steps=3)
    for trainer in (plain, equal, scaled, none, permuted, weighted):
        trainer.train()
    assert logs(equal)[0] == pytest.approx(0.5 * logs(plain)[0], abs=1e-6)
    assert logs(scaled) == pytest.approx(logs(plain), abs=1e-6)
    assert furthest(scaled.model, plain.model) < 1e-6
    assert logs(none, "grad_norm") == [0.0]
    assert furthest(none.model, tiny_model()) == 0.0
    assert logs(permuted)[0] != pytest.approx(logs(weighted)[0], abs=1e-4)
    assert furthest(permuted.model, weighted.model) > 1e-4


def test_evaluation_is_stock_trls(tmp_path):
    held_out = tiny_pairs(7, seed=9)
    ours = grouped(tmp_path / "a", eval_dataset=held_out, per_device_eval_batch_size=2, max_steps=3)
    theirs = stock(tmp_path / "b", eval_dataset=held_out, per_device_eval_batch_size=42, max_steps=3)
    ours.train()
    theirs.train()
    one, other = ours.evaluate(), theirs.evaluate()
    assert one["eval_loss"] == pytest.approx(other["eval_loss"], abs=1e-4)
    assert logs(ours, "eval_rewards/margins") == pytest.approx(logs(theirs, "eval_rewards/margins"), abs=1e-3)


def uneven(*counts: int) -> Dataset:
    """Prompts with so many pairs each."""
    return Dataset.from_list([row for seed, count in enumerate(counts) for row in tiny_pairs(1, 1, count, seed=seed)])


def test_evaluation_is_the_mean_over_pairs_under_the_name_that_was_asked_for(tmp_path):
    """Prompts with 1, 12 and 2 pairs, one a batch; named sets; another prefix."""
    sets = {"a": uneven(1, 12, 2), "b": tiny_pairs(5, seed=3)}
    ours = grouped(tmp_path / "a", eval_dataset=sets, per_device_eval_batch_size=1, max_steps=3)
    theirs = stock(tmp_path / "b", eval_dataset=sets, per_device_eval_batch_size=15, max_steps=3)
    ours.train()
    theirs.train()
    one = ours.evaluate()
    assert one["eval_a_loss"] == pytest.approx(theirs.evaluate()["eval_a_loss"], abs=1e-4)
    assert "eval_loss" not in one
    assert one["eval_a_loss"] != pytest.approx(one["eval_b_loss"], abs=1e-3)
    named = ours.evaluate(ours.eval_dataset["a"], metric_key_prefix="test")
    assert named["test_loss"] == one["eval_a_loss"]
    assert not {key for key in named if key.startswith("eval")}


def test_the_best_model_is_chosen_by_the_set_that_was_named(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 6,
                "load_best_model_at_end": True, "metric_for_best_model": "a_loss", "learning_rate": 0.02}  # fmt: skip
    trainer = grouped(tmp_path, eval_dataset={"a": uneven(1, 12, 2), "b": tiny_pairs(5, seed=3)}, **settings)
    trainer.train()
    losses = dict(zip((2, 4, 6), logs(trainer, "eval_a_loss"), strict=True))
    best = min(losses, key=losses.get)
    assert trainer.state.best_metric == losses[best]
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert trainer.evaluate()["eval_a_loss"] == pytest.approx(losses[best], abs=1e-6)


def test_a_new_dataset_is_evaluated_while_its_reference_can_be_had(tmp_path):
    new = tiny_pairs(4, seed=8)
    kept = grouped(tmp_path / "a", ref_model=tiny_model(), max_steps=2)
    whole = grouped(tmp_path / "b", eval_dataset=new, max_steps=2)
    lora = grouped(tmp_path / "c", peft_config=LoraConfig(r=4, target_modules=["q_proj"]), max_steps=2)
    assert whole.evaluate(new)["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    for trainer in (kept, whole, lora):
        trainer.train()
    assert kept.evaluate(new)["eval_loss"] == pytest.approx(whole.evaluate()["eval_loss"], abs=1e-5)
    assert lora.evaluate(new)["eval_loss"] != pytest.approx(math.log(2), abs=1e-6)
    with pytest.raises(PersodpoError, match="ref_model"):
        whole.evaluate(new)
    with pytest.raises(PersodpoError, match="is a stream"):
        kept.evaluate(new.to_iterable_dataset())


def test_a_model_that_was_changed_by_hand_is_no_reference(tmp_path):
    new = tiny_pairs(4, seed=8)
    trainer = grouped(tmp_path)
    trainer.model.load_state_dict(tiny_model(seed=9).state_dict())
    with pytest.raises(PersodpoError, match="weights have changed"):
        trainer.evaluate(new)
    later = grouped(tmp_path, eval_dataset=new)
    assert later.evaluate()["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)


def shortened(rows):
    return dict(rows) | {"chosen": [" ".join(text.split()[:2]) for text in rows["chosen"]]}


def times_ten(rows):
    return dict(rows) | {name: [10 * score for score in rows[name]] for name in ("score_chosen", "score_rejected")}


@pytest.mark.parametrize(
    ("change", "key", "weighting"), [(shortened, "loss", "none"), (times_ten, "weights", "sigmoid")]
)
def test_a_datasets_own_transform_is_what_is_trained(tmp_path, change, key, weighting):
    found = []
    for name, dataset in {
        "shown": tiny_pairs().with_transform(change), "mapped": tiny_pairs().map(change, batched=True), "raw": tiny_pairs(),
    }.items():  # fmt: skip
        trainer = grouped(tmp_path / name, dataset, weighting=weighting, max_steps=3)
        trainer.train()
        found.append(logs(trainer, key))
    shown, mapped, raw = found
    assert shown == pytest.approx(mapped, abs=1e-6)
    assert shown != pytest.approx(raw, abs=1e-4)


def test_columns_that_a_dataset_hides_are_not_trained(tmp_path):
    whole = tiny_pairs().map(lambda row: {side: row["prompt"] + row[side] for side in ("chosen", "rejected")})
    hidden = grouped(tmp_path / "a", whole.with_format(columns=["chosen", "rejected"]), max_steps=2)
    removed = grouped(tmp_path / "b", whole.select_columns(["chosen", "rejected"]), max_steps=2)
    assert hidden.train_dataset["prompt_ids"][:] == removed.train_dataset["prompt_ids"][:]


def test_a_model_may_be_trained_twice_in_mixed_precision(tmp_path):
    model = tiny_model()
    for name in ("first", "second"):
        trainer = grouped(tmp_path / name, model=model, bf16=True, max_steps=2)
        trainer.train()
        assert logs(trainer)[0] == pytest.approx(math.log(2), abs=2e-2)
    assert trainer.state.total_flos > 0


def test_a_set_to_evaluate_may_be_called_train(tmp_path):
    pairs = tiny_pairs(4).to_list()
    train = Dataset.from_list([*pairs, pairs[0] | {"rejected": pairs[0]["chosen"]}])
    trainer = grouped(tmp_path, train, eval_dataset={"train": tiny_pairs(4)})
    assert {name: skipped.identical for name, skipped in trainer.skipped.items()} == {"train": 1, "eval train": 0}


@pytest.mark.parametrize("score", [math.nan, math.inf, None])
def test_a_score_that_is_no_number_is_refused_with_its_row(tmp_path, score):
    dataset = tiny_pairs()
    broken = scored(
        dataset, [*dataset["score_chosen"][:5], score, *dataset["score_chosen"][6:]], dataset["score_rejected"]
    )
    with pytest.raises(PersodpoError, match=rf"score_chosen of row 5 .* {score}"):
        grouped(tmp_path, broken, weighting="sigmoid")


def test_weights_have_mean_one_over_the_pairs_that_are_trained(tmp_path):
    """Pairs of equal sides, which are left out, weigh 0.5; the others 0.73."""
    rows = tiny_pairs(4).to_list()
    for number, row in enumerate(rows):
        row |= {"score_chosen": 1.0, "score_rejected": 0.0}
        if number % 2:
            row |= {"rejected": row["chosen"], "score_chosen": 0.0}
    with pytest.warns(UserWarning, match=r"train dataset, left out pairs: 12 \(chosen equals rejected\); 12 stay"):
        trainer = grouped(tmp_path, Dataset.from_list(rows), weighting="sigmoid", scale_weights=True, max_steps=1)
    assert [weight for row in trainer.train_dataset["weights"] for weight in row] == pytest.approx([1.0] * 12)
    trainer.train()
    assert logs(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)


def test_a_group_larger_than_the_budget_is_split_and_trains_the_same(tmp_path):
    dataset = tiny_pairs(3, 5, 6)
    trainers = [grouped(tmp_path / str(budget), dataset, token_budget=budget, max_steps=4, per_device_train_batch_size=3)
                for budget in (1000, 40)]  # fmt: skip
    for trainer in trainers:
        trainer.train()
    batch = next(iter(trainers[1].get_train_dataloader()))["batch"]
    assert max(rows.input_ids.numel() for rows in batch.rows) <= 40
    assert batch.pairs == 90
    assert logs(trainers[1]) == pytest.approx(logs(trainers[0]), abs=1e-5)
    assert logs(trainers[1], "grad_norm") == pytest.approx(logs(trainers[0], "grad_norm"), rel=1e-4)
    assert drift(trainers[1].model, trainers[0].model) < 2e-3


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
        grouped(tmp_path / "b", model=damaged, max_steps=1)


def test_a_folder_of_adapters_is_no_model_to_train(tmp_path):
    first = grouped(tmp_path / "a", peft_config=LoraConfig(r=4, target_modules=["q_proj"]), max_steps=1)
    tiny_model().save_pretrained(tmp_path / "base")
    first.model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    first.save_model(str(tmp_path / "adapters"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapters")
    for extra in ({}, {"peft_config": LoraConfig(r=2, target_modules=["q_proj"])}):
        with pytest.raises(PersodpoError, match="merge them into their base first"):
            grouped(tmp_path / "b", model=loaded, **extra)


def test_the_reference_cache_knows_the_config(tmp_path):
    """The same weights with another rope_theta are another model."""
    cache = {"reference_cache": str(tmp_path / "cache"), "max_steps": 1}
    grouped(tmp_path / "a", **cache).train()
    other = tiny_model()
    other = type(other)(type(other.config)(**(other.config.to_dict() | {"rope_parameters": None, "rope_theta": 10.0})))
    other.load_state_dict(tiny_model().state_dict())
    trainer = grouped(tmp_path / "b", model=other, **cache)
    trainer.train()
    assert logs(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 2


def test_the_reference_cache_knows_what_parameters_do_not_tell(tmp_path):
    """The same weights and config under another scale of attention."""
    cache = {"reference_cache": str(tmp_path / "cache"), "max_steps": 1}
    grouped(tmp_path / "a", **cache)
    other = tiny_model()
    for layer in other.model.layers:
        layer.self_attn.scaling *= 0.5
    trainer = grouped(tmp_path / "b", model=other, **cache)
    trainer.train()
    assert logs(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)


def test_an_adapter_as_reference_stays_on(tmp_path):
    """Policy: base with merged adapter. Reference: the same, unmerged."""
    adapter = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    reference = get_peft_model(tiny_model(), adapter)
    merged = copy.deepcopy(reference).merge_and_unload().requires_grad_(True)
    trainer = grouped(tmp_path, model=merged, ref_model=reference, max_steps=1)
    trainer.train()
    assert logs(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)


def test_a_reference_that_was_trained_is_neither_used_nor_cached(tmp_path):
    """Weights beside the adapters are trained, so that without adapters the model is no longer what it was."""
    cache = {"reference_cache": str(tmp_path / "cache"), "max_steps": 2}
    new = tiny_pairs(4, seed=8)
    trainer = grouped(tmp_path / "a", peft_config=LoraConfig(r=4, target_modules=["q_proj"], bias="all"), **cache)
    trainer.train()
    files = len(list((tmp_path / "cache").glob("*")))
    with pytest.raises(PersodpoError, match="ref_model"):
        trainer.evaluate(new)
    assert len(list((tmp_path / "cache").glob("*"))) == files


def test_a_dataset_of_another_trainer_is_refused(tmp_path):
    first = grouped(tmp_path / "a", max_steps=1)
    with pytest.raises(PersodpoError, match="grouped by another trainer"):
        grouped(tmp_path / "b", first.train_dataset)


def test_tokens_without_an_embedding_are_refused(tmp_path):
    small = tiny_model()
    small.resize_token_embeddings(40)
    with pytest.raises(PersodpoError, match="has no embedding"):
        grouped(tmp_path, model=small)


def test_the_users_own_config_is_taken_and_left_as_it_was(tmp_path):
    @dataclass
    class Mine(DPOConfig):
        mine: int = 3
        weighting: str = "sigmoid"

    args = Mine(str(tmp_path), **(TINY | {"max_steps": 1}))
    before = dict(vars(args))
    seen = []

    class Reads(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(args.mine)

    with pytest.warns(UserWarning, match="precompute_ref_log_probs=False has no effect"):
        trainer = GroupedDPOTrainer(
            model=tiny_model(), args=args, train_dataset=tiny_pairs(4), processing_class=tiny_tokenizer(),
            callbacks=[Reads()],
        )  # fmt: skip
    trainer.train()
    assert seen == [3]
    assert dict(vars(args)) == before
    assert logs(trainer, "weights")[0] != 1.0


def test_what_has_no_effect_is_said(tmp_path):
    for name, value in (("precompute_ref_batch_size", 3), ("disable_dropout", False)):
        with pytest.warns(UserWarning, match=f"{name}={value}"):
            grouped(tmp_path, **{name: value})


def test_the_card_says_what_trl_does_not_know(tmp_path):
    rows = tiny_pairs(4).to_list()
    rows[0]["rejected"] = rows[0]["chosen"]
    trainer = grouped(tmp_path, Dataset.from_list(rows), weighting="sigmoid", scale_weights=True, max_steps=1)
    trainer.create_model_card("mine")
    card = (tmp_path / "README.md").read_text()
    for part in (versions()["persodpo"], "all responses of a prompt in one row", "sigmoid, scaled to mean 1",
                 "1 (chosen equals rejected)"):  # fmt: skip
        assert part in card


def test_resuming_is_bit_identical(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8, "train_sampling_strategy": "random"}
    whole = grouped(tmp_path / "a", **settings)
    whole.train()
    halved = grouped(tmp_path / "b", **(settings | {"max_steps": 4}))
    halved.train()
    rest = grouped(tmp_path / "b", **settings)
    rest.train(resume_from_checkpoint=True)
    assert logs(rest)[-4:] == logs(whole)[-4:]
    assert furthest(rest.model, whole.model) == 0.0


def test_a_checkpoint_is_safetensors_with_a_card_and_loads(tmp_path):
    trainer = grouped(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    folder = tmp_path / "checkpoint-2"
    assert (folder / "model.safetensors").exists()
    assert (folder / "trainer_state.json").exists()
    assert (tmp_path / "README.md").exists()
    assert not list((tmp_path / "final").glob("pytorch_model*"))
    again = type(trainer.model).from_pretrained(tmp_path / "final")
    assert furthest(again, trainer.model) == 0.0


def test_reference_log_probs_are_cached_under_what_they_depend_on(tmp_path):
    cache = {"reference_cache": str(tmp_path / "cache"), "max_steps": 1}

    def files() -> int:
        return len(list((tmp_path / "cache").glob("*.safetensors")))

    first = grouped(tmp_path / "a", **cache)
    stamp = next((tmp_path / "cache").glob("*")).stat().st_mtime_ns
    again = grouped(tmp_path / "b", **cache)
    assert files() == 1
    assert next((tmp_path / "cache").glob("*")).stat().st_mtime_ns == stamp
    assert first.train_dataset["reference"] == again.train_dataset["reference"]
    grouped(tmp_path / "c", model=tiny_model(seed=1), **cache)
    assert files() == 2
    grouped(tmp_path / "d", max_length=9, **cache)
    assert files() == 3
    next((tmp_path / "cache").glob("*.safetensors")).write_bytes(b"cut off")
    grouped(tmp_path / "e", **cache)
    assert files() == 3


def test_bf16_stays_near_fp32(tmp_path):
    """bf16 autocast: losses within 0.02 of fp32 over ten steps."""
    full, half = grouped(tmp_path / "a", max_steps=10), grouped(tmp_path / "b", max_steps=10, bf16=True)
    full.train()
    half.train()
    assert logs(half) == pytest.approx(logs(full), abs=0.02)
    assert logs(half)[0] == pytest.approx(math.log(2), abs=1e-3)
    assert logs(half) != logs(full)


SCRIPT = """
import json, os, sys
sys.path.insert(0, {tests!r})
import torch
from accelerate.state import AcceleratorState, DistributedType
from tiny import TINY, tiny_pairs, tiny_tokenizer
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
args = GroupedDPOConfig(folder, **(TINY | {{
    "per_device_train_batch_size": batch, "per_device_eval_batch_size": batch, "max_steps": 6, "token_budget": 70,
    "weighting": "sigmoid", "eval_on_start": True}} | extra))
wrapped = set()

class Trainer(GroupedDPOTrainer):
    def training_step(self, model, *args):
        wrapped.add(type(model).__name__)
        return super().training_step(model, *args)

trainer = Trainer(
    model=AutoModelForCausalLM.from_pretrained(model, attn_implementation="sdpa"), args=args,
    train_dataset=tiny_pairs(), eval_dataset=tiny_pairs(7, seed=9), processing_class=tiny_tokenizer())
if way == "early":
    trainer.evaluate()
trainer.train()
after = trainer.evaluate()
trainer.save_model(folder)
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
        command = [*([sys.executable] if way == "one" else launch), str(script), str(tmp_path / way)]
        done = subprocess.run(
            [*command, str(tmp_path / "model"), way], capture_output=True, text=True, timeout=300, check=False,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
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
def test_what_cannot_be_grouped_is_refused_by_name(tmp_path, changes, words):
    with pytest.raises(PersodpoError) as refused:
        grouped(tmp_path, **changes)
    assert words in str(refused.value)


def test_a_compiled_model_is_refused_however_it_was_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")
    with pytest.raises(PersodpoError, match="ACCELERATE_DYNAMO_BACKEND"):
        grouped(tmp_path)


def test_weighting_needs_scores(tmp_path):
    bare = tiny_pairs().remove_columns(["score_chosen"])
    with pytest.raises(PersodpoError, match="needs the columns score_chosen and score_rejected in the train dataset"):
        grouped(tmp_path, bare, weighting="sigmoid")
    grouped(tmp_path, bare, max_steps=1).train()


def test_pairs_that_cannot_be_trained_on_are_counted(tmp_path):
    rows = tiny_pairs(4).to_list()
    rows[0]["rejected"] = rows[0]["chosen"]
    trainer = grouped(tmp_path, Dataset.from_list(rows), max_steps=1)
    assert trainer.skipped["train"].identical == 1
    assert sum(len(chosen) for chosen in trainer.train_dataset["chosen"]) == len(rows) - 1


def test_a_plain_dpo_config_is_enough(tmp_path):
    trainer = GroupedDPOTrainer(
        model=tiny_model(), args=DPOConfig(str(tmp_path), **(TINY | {"max_steps": 1})), train_dataset=tiny_pairs(),
        processing_class=tiny_tokenizer(),
    )  # fmt: skip
    trainer.train()
    assert logs(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)


def test_four_bits_on_a_cpu_are_refused(tmp_path):
    """After an evaluation bitsandbytes would train them without gradients, and silently."""
    model = tiny_model()
    model.is_loaded_in_4bit = True
    with pytest.raises(PersodpoError, match=r"4-bit weights on a CPU cannot be trained: .* load the model on a GPU"):
        GroupedDPOTrainer(
            model=model, args=GroupedDPOConfig(str(tmp_path), **TINY), train_dataset=tiny_pairs(4),
            processing_class=tiny_tokenizer(),
        )  # fmt: skip


def test_a_beta_that_a_callback_changes_reaches_the_loss(tmp_path):
    class Rising(TrainerCallback):
        trainer = None

        def on_step_begin(self, args, state, control, **kwargs):
            self.trainer.beta = 0.1 * (1 + state.global_step)

    trainers = [grouped(tmp_path / "a", max_steps=4), stock(tmp_path / "b", max_steps=4)]
    for trainer in trainers:
        rising = Rising()
        rising.trainer = trainer
        trainer.add_callback(rising)
        trainer.train()
    assert logs(trainers[0]) == pytest.approx(logs(trainers[1]), abs=1e-5)


def test_large_scores_are_subtracted_before_they_are_rounded(tmp_path):
    dataset, count = tiny_pairs(), len(tiny_pairs())
    trainer = grouped(tmp_path, scored(dataset, [1e9 + 0.5] * count, [1e9] * count), weighting="sigmoid", max_steps=1)
    assert trainer.train_dataset[0]["weights"] == pytest.approx([1 / (1 + math.exp(-0.5))] * PAIRS_A_PROMPT)


def test_a_reference_with_another_active_adapter_has_a_cache_of_its_own(tmp_path):
    def reference(active: str):
        torch.manual_seed(1)
        model = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
        model.add_adapter("b", LoraConfig(r=4, target_modules=["v_proj"], init_lora_weights=False))
        model.set_adapter(active)
        return model

    values = [
        grouped(tmp_path, ref_model=reference(name)).train_dataset["reference"]
        for name in ("default", "b")
    ]  # fmt: skip
    assert values[0] != values[1]


def test_joined_datasets_are_evaluated_whole(tmp_path):
    sets = {"one": tiny_pairs(4, seed=1), "two": tiny_pairs(3, seed=2)}
    trainer = grouped(tmp_path, eval_dataset=sets)
    apart = [trainer.evaluate(trainer.eval_dataset[name])["eval_loss"] for name in sets]
    trainer.eval_dataset = concatenate_datasets(list(trainer.eval_dataset.values()))
    assert trainer.evaluate()["eval_loss"] == pytest.approx((4 * apart[0] + 3 * apart[1]) / 7, abs=1e-6)
    twice = trainer.eval_dataset.select([0, 0, 0, 1])
    losses = [trainer.predict(trainer.eval_dataset.select([row])).metrics["test_loss"] for row in (0, 1)]
    assert trainer.predict(twice).metrics["test_loss"] == pytest.approx((3 * losses[0] + losses[1]) / 4, abs=1e-6)
    with pytest.raises(PersodpoError, match="predict takes a dataset of this trainer"):
        trainer.predict(sets["one"])


def test_datasets_in_torch_format_are_grouped(tmp_path):
    assert len(grouped(tmp_path, tiny_pairs().with_format("torch")).train_dataset) == 24


def test_a_reference_of_its_own_trains_in_half_precision_as_stock(tmp_path):
    ours = grouped(tmp_path / "a", ref_model=tiny_model(seed=5), bf16=True, max_steps=2)
    ours.train()
    theirs = DPOTrainer(
        model=tiny_model(), ref_model=tiny_model(seed=5), train_dataset=tiny_pairs(), processing_class=tiny_tokenizer(),
        args=DPOConfig(str(tmp_path / "b"), **TINY | {"per_device_train_batch_size": 24, "max_steps": 2, "bf16": True}),
    )  # fmt: skip
    theirs.train()
    assert ours.packing.grouped
    assert logs(ours) == pytest.approx(logs(theirs), abs=0.02)


def test_what_is_frozen_of_an_adapter_stays_frozen(tmp_path):
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, weight in model.named_parameters():
        weight.requires_grad_("lora_B" in name)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    grouped(tmp_path, model=model, max_steps=2).train()
    weights = {name: weight for name, weight in model.named_parameters() if name in before}
    moved = {name for name, weight in weights.items() if not torch.equal(weight, before[name])}
    assert moved
    assert all("lora_B" in name for name in moved)


def test_a_callback_that_moves_the_reference_is_refused_later_too(tmp_path):
    trainer = grouped(tmp_path, max_steps=1)
    with pytest.raises(PersodpoError, match="SyncRefModelCallback"):
        trainer.add_callback(SyncRefModelCallback(tiny_model(), trainer.accelerator))
