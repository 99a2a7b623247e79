"""TRL's DPOTrainer on grouped, packed rows: same arguments, same losses and gradients, a fraction of the work.

A dataset row is a prompt with its distinct responses and its pairs, so ``per_device_train_batch_size`` counts prompts.
A batch is cut into micro-batches of rows of like length under a token budget, and the loss is divided by the pairs of
the optimiser step over all ranks: a prompt with twelve pairs counts twelve times. Reference log-probabilities are
computed once a response, before training, by the same forward pass as the policy's, so the first loss is the weight
times log 2.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import Tensor, nn
from trl import DPOConfig, DPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from persodpo.errors import PersodpoError
from persodpo.training.forward import check_attention, install_packed_forward
from persodpo.training.loss import LossSettings, Pairs, Weighting, pair_losses, pair_weights
from persodpo.training.packing import Group, PackedRows, Skipped, TokenPair, group_pairs, micro_batches, pack
from persodpo.training.reference import load_reference, reference_key, reference_log_probs, save_reference

GROUP_COLUMNS = ("prompt_ids", "response_ids", "chosen", "rejected", "weights", "offsets")
SCORES = ("score_chosen", "score_rejected")
#: Arguments that look at a response's partner or change the reference, with the only value that can be grouped.
UNGROUPED = {"ld_alpha": None, "use_weighting": False, "sync_ref_model": False, "truncation_mode": "keep_start"}


@dataclass
class GroupedDPOConfig(DPOConfig):  # type: ignore[misc]
    """DPOConfig with what grouping and weighting add.

    Attributes:
        weighting: ``none``, ``sigmoid`` (of the score margin, PersoDPO's formula) or ``offset`` (the score margin inside
            the logit). The last two need the columns score_chosen and score_rejected.
        scale_weights: Divide the weights by their mean over the dataset, so that weighting is no hidden learning rate.
        token_budget: Most positions of a micro-batch, padding included.
        reference_cache: Folder of cached reference log-probabilities; None takes ``output_dir/reference``.
    """

    weighting: Weighting = "none"
    scale_weights: bool = False
    token_budget: int = 4096
    reference_cache: str | None = None


@dataclass
class Batch:
    """A collated batch.

    Attributes:
        rows: Packed micro-batches.
        reference: Reference log-probability of each response of each micro-batch, [responses].
        tokens: Positions that are no padding.
    """

    rows: list[PackedRows]
    reference: list[Tensor]
    tokens: int

    @property
    def pairs(self) -> int:
        """Number of pairs."""
        return sum(len(rows.weights) for rows in self.rows)


@dataclass(frozen=True)
class GroupCollator:
    """Packs dataset rows into micro-batches.

    Attributes:
        token_budget: Most positions of a micro-batch.
        pad_token_id: Fills rows.
    """

    token_budget: int
    pad_token_id: int

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Batch]:
        """Return the batch, in a dict as transformers expects."""
        groups = [to_group(example) for example in examples]
        batch = Batch([], [], sum(group.tokens for group in groups))
        for places in micro_batches(groups, self.token_budget):
            batch.rows.append(pack([groups[place] for place in places], self.pad_token_id))
            batch.reference.append(torch.tensor([value for place in places for value in examples[place]["reference"]]))
        return {"batch": batch}


def to_group(example: Mapping[str, Any]) -> Group:
    """Return a dataset row as a group."""
    prompt, responses, *rest = (example[name] for name in GROUP_COLUMNS)
    return Group(list(prompt), [list(ids) for ids in responses], *map(list, rest))


class GroupedDPOTrainer(DPOTrainer):  # type: ignore[misc]
    """DPOTrainer that processes each prompt and each distinct response once.

    Takes what TRL's DPOTrainer takes, but for a collator, ``compute_metrics`` (no logits are built) and streams. The
    dataset may hold ``score_chosen`` and ``score_rejected``. A plain dataset of pairs that are no cross product trains
    correctly too.

    Attributes:
        skipped: Pairs that were left out, by dataset name.
    """

    # The loss is a sum divided by the pairs of the whole optimiser step, so it is scaled already.
    loss_is_scaled_for_ga = True

    def __init__(  # noqa: PLR0917 - the order of TRL's own arguments
        self,
        model: Any,
        ref_model: Any = None,
        args: DPOConfig | None = None,
        data_collator: None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        compute_metrics: None = None,
        **kwargs: Any,
    ) -> None:
        """Group the datasets and compute their reference log-probabilities; arguments as TRL's DPOTrainer.

        Raises:
            PersodpoError: The loss, an argument or the attention cannot be grouped (each is refused by name), weighting
                was asked for without scores, or no pair is left.
        """
        args = args or GroupedDPOConfig("grouped-dpo")
        given = {"data_collator": data_collator, "compute_metrics": compute_metrics}
        for name, value in given.items():
            if value is not None:
                raise PersodpoError(f"{name} cannot be used with grouped rows; leave it out.")
        for name, allowed in UNGROUPED.items():
            if getattr(args, name) != allowed:
                raise PersodpoError(f"{name}={getattr(args, name)!r} cannot be grouped; set it to {allowed!r}.")
        self.loss_settings = LossSettings(
            tuple([args.loss_type] if isinstance(args.loss_type, str) else args.loss_type),
            tuple(args.loss_weights or ()),
            args.beta,
            args.label_smoothing,
            args.f_divergence_type,
            args.f_alpha_divergence_coef,
            args.discopop_tau,
        )
        if not isinstance(args, GroupedDPOConfig):
            args = GroupedDPOConfig(**{name: value for name, value in vars(args).items() if _is_argument(name)})
        self.skipped: dict[str, Skipped] = {}
        self._sums: dict[str, dict[str, Tensor]] = {"train": {}, "eval": {}}
        args.precompute_ref_log_probs = True
        args.remove_unused_columns = False
        super().__init__(
            model=model,
            ref_model=ref_model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            **kwargs,
        )
        self.data_collator = GroupCollator(args.token_budget, self._tokenizer.pad_token_id)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: DPOConfig, dataset_name: str) -> Dataset:
        """Tokenise as TRL does, then group."""
        if isinstance(dataset, IterableDataset):
            raise PersodpoError(
                f"The {dataset_name} dataset is a stream; grouping needs all pairs of a prompt at hand."
            )
        if set(GROUP_COLUMNS) <= set(dataset.column_names):
            return dataset
        if args.weighting != "none" and not set(SCORES) <= set(dataset.column_names):
            raise PersodpoError(
                f"weighting '{args.weighting}' needs the columns {' and '.join(SCORES)} in the {dataset_name} dataset."
            )
        tokenised = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        groups, skipped = group_pairs(_token_pairs(tokenised, args.weighting, args.scale_weights), args.max_length)
        too_long = skipped.long_prompt + len(dataset) - len(tokenised)
        self.skipped[dataset_name] = Skipped(too_long, skipped.empty, skipped.identical)
        if not groups:
            raise PersodpoError(f"The {dataset_name} dataset has no pair to train on; {self.skipped[dataset_name]}.")
        fields = ("prompt", "responses", "chosen", "rejected", "weights", "offsets")
        columns = {
            name: [getattr(group, field) for group in groups] for name, field in zip(GROUP_COLUMNS, fields, strict=True)
        }
        return Dataset.from_dict(columns)

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """Add the reference log-probability of each distinct response, from the cache or computed once."""
        model = self.ref_model or self.model
        install_packed_forward(self.model)
        install_packed_forward(model)
        check_attention(model)
        if getattr(model, "is_loaded_in_4bit", False) and model.device.type == "cpu":
            raise PersodpoError(
                "4-bit weights on a CPU cannot be trained: bitsandbytes packs them at the first evaluation, and no gradient "
                "passes them from then on; load the model on a GPU, or without quantisation."
            )
        groups = [to_group(example) for example in dataset]
        named = {
            "model": self._precompute_model_hash, "dtype": model.dtype, "attention": model.config._attn_implementation,
            "autocast": self.accelerator.mixed_precision, "max_length": self.args.max_length,
        }  # fmt: skip
        folder = Path(self.args.reference_cache or Path(self.args.output_dir) / "reference")
        path = folder / f"{reference_key(groups, **named)}.safetensors"
        values = load_reference(path, groups)
        if values is None:
            values = self._reference_values(model, groups)
            if self.accelerator.is_main_process:
                save_reference(path, values, **named)
        return dataset.add_column("reference", values)

    def _reference_values(self, model: Any, groups: list[Group]) -> list[list[float]]:
        """Compute reference log-probabilities, each process its share."""
        training = model.training
        model.eval()

        def forward(rows: PackedRows) -> Tensor:
            with self.accelerator.autocast():
                log_probs: Tensor = model(packed=rows.to(self.accelerator.device))
            return log_probs

        with disable_gradient_checkpointing(model, self.args.gradient_checkpointing_kwargs), _adapters_off(model):
            found = reference_log_probs(
                forward,
                groups,
                token_budget=self.args.token_budget,
                pad_token_id=self._tokenizer.pad_token_id,
                share=(self.accelerator.process_index, self.accelerator.num_processes),
            )
        model.train(training)
        merged = {place: values for part in gather_object([found]) for place, values in part.items()}
        return [merged[place] for place in range(len(groups))]

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Batch]], device: torch.device) -> Tensor:
        """Count the pairs of the optimiser step over all ranks."""
        pairs = torch.tensor(sum(sample["batch"].pairs for sample in batch_samples), device=device)
        total: Tensor = self.accelerator.gather(pairs).sum() if self.args.world_size > 1 else pairs
        return total

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | None = None
    ) -> Tensor:
        """Run forward and backward a micro-batch at a time; gradients are reduced over ranks with the last one only."""
        batch: Batch = inputs["batch"]
        total = torch.zeros((), device=self.accelerator.device)
        for number, micro in enumerate(zip(batch.rows, batch.reference, strict=True)):
            last = number == len(batch.rows) - 1
            with nullcontext() if last else self.accelerator.no_sync(model):
                total = total + super().training_step(model, {"micro": micro}, num_items_in_batch)
        self._total_train_tokens += batch.tokens
        return total

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """Return the weighted loss of one micro-batch: the sum over its pairs divided by the pairs of the step."""
        rows, reference = (part.to(self.accelerator.device) for part in inputs["micro"])
        log_probs = model(packed=rows)
        ratio = log_probs - reference
        pairs = Pairs(ratio[rows.chosen], ratio[rows.rejected], rows.lengths[rows.chosen], rows.lengths[rows.rejected])
        losses = rows.weights * pair_losses(pairs, self.loss_settings, rows.offsets)
        self._count(model.training, losses, pairs, log_probs, rows)
        # DistributedDataParallel averages over ranks what is to be a sum.
        loss: Tensor = losses.sum() / num_items_in_batch * self.args.world_size
        return loss

    @torch.no_grad()
    def _count(self, training: bool, losses: Tensor, pairs: Pairs, log_probs: Tensor, rows: PackedRows) -> None:
        """Add a micro-batch to the sums from which the metrics are made."""
        sums = self._sums["train" if training else "eval"]
        chosen, rejected = self.beta * pairs.chosen, self.beta * pairs.rejected
        found = {
            "pairs": torch.ones_like(losses), "loss": losses, "rewards/chosen": chosen, "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected, "rewards/accuracies": (chosen > rejected).float(),
            "logps/chosen": log_probs[rows.chosen], "logps/rejected": log_probs[rows.rejected], "weights": rows.weights,
        }  # fmt: skip
        for name, values in found.items():
            sums[name] = sums.get(name, torch.zeros((), device=losses.device)) + values.sum()

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any
    ) -> tuple[Tensor, None, None]:
        """Evaluate a batch; the exact mean over pairs is logged in `log`."""
        batch: Batch = inputs["batch"]
        total = torch.zeros((), device=self.accelerator.device)
        with torch.no_grad(), self.compute_loss_context_manager():
            for micro in zip(batch.rows, batch.reference, strict=True):
                total = total + self.compute_loss(model, {"micro": micro}, num_items_in_batch=batch.pairs)
        return total / self.args.world_size, None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log means over the pairs of all ranks, under TRL's names."""
        mode = "train" if self.model.training else "eval"
        sums, self._sums[mode] = self._sums[mode], {}
        if sums:
            names = sorted(sums)
            stacked = torch.stack([sums[name] for name in names])[None]
            totals = self.accelerator.gather(stacked).sum(0) if self.args.world_size > 1 else stacked[0]
            means = dict(zip(names, (totals / totals[names.index("pairs")]).tolist(), strict=True))
            if mode == "eval":
                logs["eval_loss"] = means["loss"]
            kept = {name: [mean] for name, mean in means.items() if name not in {"pairs", "loss"}}
            self._metrics[mode] = defaultdict(list, kept, num_tokens=[float(self._total_train_tokens)])
        super().log(logs, start_time)


def _is_argument(name: str) -> bool:
    """Tell whether an attribute of DPOConfig is one of its arguments."""
    field = GroupedDPOConfig.__dataclass_fields__.get(name)
    return field is not None and field.init


def _token_pairs(dataset: Dataset, weighting: Weighting, scale: bool) -> list[TokenPair]:
    """Attach weight and offset to each tokenised pair."""
    weights, offsets = torch.ones(len(dataset)), torch.zeros(len(dataset))
    if weighting != "none":
        chosen, rejected = (torch.tensor(dataset[name], dtype=torch.float32) for name in SCORES)
        weights = pair_weights(chosen, rejected, weighting, scale_to_mean_one=scale)
        offsets = chosen - rejected if weighting == "offset" else offsets
    columns = (
        dataset["prompt_ids"],
        dataset["chosen_ids"],
        dataset["rejected_ids"],
        weights.tolist(),
        offsets.tolist(),
    )
    return [TokenPair(*row) for row in zip(*columns, strict=True)]


def _adapters_off(model: Any) -> AbstractContextManager[Any]:
    """Return a context in which a PEFT model is its own reference; nothing for other models."""
    if not isinstance(model, PeftModel):
        return nullcontext()
    context: AbstractContextManager[Any] = use_adapter(model, "ref" if "ref" in model.peft_config else None)
    return context
