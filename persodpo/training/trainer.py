"""TRL's DPOTrainer on grouped, packed rows: same arguments, same losses and gradients, a fraction of the work.

A dataset row is a prompt with its distinct responses and its pairs, so ``per_device_train_batch_size`` counts prompts.
A batch is cut into micro-batches of rows of like length under a token budget, and the loss is divided by the pairs of
the optimiser step over all ranks: a prompt with twelve pairs counts twelve times. Reference log-probabilities are
computed once per response, before training, by the same forward pass as the policy's, so the first loss is the weight
times log 2. Before that `persodpo.training.guard.check_packing` decides whether the model may be given packed rows.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from trl import DPOConfig, DPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import hash_module

from persodpo.errors import PersodpoError
from persodpo.training.checks import check_models, check_vocabulary, trains_adapters_alone, unwrapped
from persodpo.training.config import GroupedDPOConfig, check_arguments, check_callback, described, option
from persodpo.training.forward import install_packed_forward, layout_of
from persodpo.training.groups import (
    GROUP_COLUMNS,
    LONG_PROMPT,
    Batch,
    Skipped,
    check_scores,
    collate,
    group_pairs,
    refuse_images,
    to_group,
    token_pairs,
    unformatted,
    widest_row,
    without_filling,
)
from persodpo.training.guard import Verdict, refuse_prompt_learning
from persodpo.training.loss import LossSettings, Pairs, pair_losses
from persodpo.training.packing import Layout, PackedRows
from persodpo.training.probe import ROUNDING
from persodpo.training.reference import (
    adapters_off,
    describe,
    known_or_computed,
    reference_key,
    reference_log_probs,
)

__all__ = ["GroupedDPOConfig", "GroupedDPOTrainer"]


class GroupedDPOTrainer(DPOTrainer):  # type: ignore[misc]
    """DPOTrainer that processes each prompt and each distinct response once.

    Takes what TRL's DPOTrainer takes, but for a collator, ``compute_metrics`` (no logits are built) and streams. The
    dataset may hold ``score_chosen`` and ``score_rejected``. A plain dataset of pairs that are no cross product trains
    correctly too. TRL's metrics are logged under its names, but for those that need all logits: ``logits/chosen``,
    ``logits/rejected``, ``entropy`` and ``mean_token_accuracy``; tokens are counted in training alone.

    Attributes:
        packing: What the guard found: grouped rows, or one response per row.
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
            PersodpoError: The loss, an argument or the model cannot be trained here (each is refused by name), weighting
                was asked for without scores, or no pair is left.
        """
        # What is changed here is changed in a copy, of the class that was given.
        args = copy.copy(args) if args else GroupedDPOConfig("grouped-dpo")
        # Transformers takes the steps to accumulate out of it, which a second trainer would miss.
        args.accelerator_config = copy.deepcopy(args.accelerator_config)
        if data_collator is not None or compute_metrics is not None:
            raise PersodpoError("data_collator and compute_metrics cannot be used with grouped rows; leave them out.")
        check_arguments(args, kwargs.get("callbacks") or ())
        refuse_images(train_dataset, "train")
        refuse_prompt_learning(kwargs.get("peft_config"))
        model, ref_model = unwrapped(model), unwrapped(ref_model)
        self.skipped: dict[str, Skipped] = {}
        self.packing: Verdict | None = None
        self._layouts: dict[int, dict[str, bool]] = {}
        self._widest = self._checked = 0
        self._mean_weight: float | None = None
        self._sums: dict[str, Tensor] = {}
        self._evaluated: list[tuple[Tensor, Tensor]] = []
        self._numbered = 0
        args.precompute_ref_log_probs = True
        args.remove_unused_columns = False
        # Transformers would log a loss that is not a number as 0; here it ends the run.
        args.logging_nan_inf_filter = False
        datasets = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
        super().__init__(model=model, ref_model=ref_model, args=args, **datasets, **kwargs)
        self.data_collator = partial(collate, token_budget=option(args, "token_budget"), layout=self._layout())

    def add_callback(self, callback: Any) -> None:
        """Add a callback as transformers does, unless it moves the reference."""
        check_callback(callback)
        super().add_callback(callback)

    def _layout(self) -> Layout:
        return Layout(
            grouped=self.packing is None or self.packing.grouped,
            closed=self.aux_loss_enabled,
            multiple_of=self.args.pad_to_multiple_of or 1,
            pad_token_id=self._tokenizer.pad_token_id,
        )

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: DPOConfig, dataset_name: str) -> Dataset:
        """Tokenise as TRL does, then group."""
        dataset = unformatted(dataset, dataset_name)
        if dataset_name == "train" and "train" in self.skipped:
            dataset_name = "eval train"
        weighting = option(args, "weighting")
        if weighting != "none":
            check_scores(dataset, dataset_name)
        tokenised = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        groups, skipped = group_pairs(token_pairs(tokenised, weighting), args.max_length, self._numbered)
        self.skipped[dataset_name] = skipped
        if len(tokenised) < len(dataset):
            skipped[LONG_PROMPT] += len(dataset) - len(tokenised)
        weights = [weight for group in groups for weight in group.weights]
        # No two pairs of a trainer have one number, so that datasets can be joined.
        self._numbered += len(weights)
        if not groups:
            raise PersodpoError(f"The {dataset_name} dataset has no pair to train on; {skipped}.")
        if skipped:
            warnings.warn(f"{dataset_name} dataset, {skipped}; {len(weights)} stay.", stacklevel=2)
        layout = Layout(closed=True, multiple_of=args.pad_to_multiple_of or 1)
        self._widest = max(self._widest, widest_row(groups, option(args, "token_budget"), layout))
        if option(args, "scale_weights"):
            if self._mean_weight is None:
                self._mean_weight = sum(weights) / len(weights) or 1.0
            for group in groups:
                group.weights = [weight / self._mean_weight for weight in group.weights]
        return Dataset.from_dict(
            {name: [getattr(group, field) for group in groups] for name, field in GROUP_COLUMNS.items()}
        )

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """Add the reference log-probability of each distinct response, from the cache or computed once."""
        budget = option(self.args, "token_budget")
        if self.packing is None or (self.packing.grouped and self._widest > self._checked):
            with disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
                verdict = check_models(
                    self.model,
                    self.ref_model,
                    max_length=self.args.max_length,
                    token_budget=budget,
                    aux_loss=self.aux_loss_enabled,
                    widest=self._widest,
                    autocast=self.accelerator.autocast,
                )
            if self.packing is not None and not verdict.grouped:
                raise PersodpoError(
                    f"Rows of the {name} dataset have up to {self._widest} columns, which the model cannot be given; name "
                    "the dataset as eval_dataset from the start."
                )
            self.packing, self._checked = verdict, self._widest
            self._layouts = {id(one): layout_of(one) for one in (self.model, self.ref_model) if one is not None}
        model = self.ref_model or self.model
        self._use_layout(model)
        groups = [to_group(example) for example in dataset]
        for one in {id(one): one for one in (self.model, model)}.values():
            check_vocabulary(one, groups)
        described = describe(model, self.packing) | {
            "weights": self._precompute_model_hash, "autocast": self.accelerator.mixed_precision,
            "max_length": self.args.max_length,
        }  # fmt: skip
        folder = Path(option(self.args, "reference_cache") or Path(self.args.output_dir) / "reference")
        path = folder / f"{reference_key(groups, **described)}.safetensors"
        adapters = adapters_off(self.model) if self.ref_model is None else nullcontext()
        training = model.training
        model.eval()
        with disable_gradient_checkpointing(model, self.args.gradient_checkpointing_kwargs), adapters:
            compute = partial(
                reference_log_probs, lambda rows: model(packed=rows), token_budget=budget, layout=self._layout(),
                accelerator=self.accelerator,
            )  # fmt: skip
            half = self.accelerator.mixed_precision != "no"
            tolerance = ROUNDING[torch.bfloat16] if half else self.packing.tolerance
            # After training the model's hash is that of its start.
            cache = path if self.state.global_step == 0 else None
            values = known_or_computed(cache, groups, compute, token_budget=budget, tolerance=tolerance, **described)
        model.train(training)
        of_responses = iter(values)
        return dataset.add_column("reference", [[next(of_responses) for _ in group.responses] for group in groups])

    def _use_layout(self, model: Any) -> None:
        """Give a model the layout that was found for it again, where another trainer or a question to the guard took it."""
        layout = self._layouts.get(id(model))  # none where FSDP has put another object around it
        if layout and layout != layout_of(model):
            install_packed_forward(model, **layout)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Batch]], device: torch.device) -> Tensor:
        """Count the pairs of the optimiser step over all ranks."""
        pairs = torch.tensor(sum(sample["batch"].pairs for sample in batch_samples), device=device)
        total: Tensor = self.accelerator.gather(pairs).sum()
        return total

    def _rounds(self, batch: Batch) -> Iterator[tuple[PackedRows, bool, bool]]:
        """Yield micro-batches, whether each is real, and whether it is the last; every rank gets as many."""
        mine = torch.tensor(len(batch.rows), device=self.accelerator.device)
        count = int(self.accelerator.gather(mine).max())
        for number in range(count):
            rows = batch.rows[min(number, len(batch.rows) - 1)].to(self.accelerator.device)
            yield rows, number < len(batch.rows), number == count - 1

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | None = None
    ) -> Tensor:
        """Run forward and backward a micro-batch at a time; gradients are reduced over ranks with the last one only.

        Raises:
            PersodpoError: The loss is not a number, or nothing would keep several processes together.
        """
        if self.args.world_size > 1 and not (self.is_fsdp_enabled or isinstance(model, DistributedDataParallel)):
            raise PersodpoError(
                "Each process would train by itself: evaluate() before train() leaves the model without its wrapper; set "
                "eval_on_start=True instead."
            )
        batch: Batch = inputs["batch"]
        if self.aux_loss_enabled and len(batch.rows) > 1:
            warnings.warn(
                "The auxiliary loss balances the experts within each micro-batch, as TRL's does within each batch of a "
                "device; raise token_budget until a step is one micro-batch for the balance of the whole step.",
                stacklevel=2,
            )
        total = torch.zeros((), device=self.accelerator.device)
        for rows, real, last in self._rounds(batch):
            with nullcontext() if last else self.accelerator.no_sync(model):
                total = total + super().training_step(model, {"rows": rows, "real": real}, num_items_in_batch)
        self._add("tokens", torch.tensor(float(batch.tokens), device=total.device))
        if not math.isfinite(float(total)):
            raise PersodpoError(
                f"The loss is {float(total)} at step {self.state.global_step + 1}, so training ends here; lower the "
                f"learning rate ({self._get_learning_rate():.3g}), or look for damaged weights. The last checkpoint in "
                f"{self.args.output_dir} is from before."
            )
        return total

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """Return the weighted loss of one micro-batch: the sum over its pairs divided by the pairs of the step."""
        values = self._pair_values(model, inputs["rows"])
        if inputs["real"]:
            for name, value in values.items():
                self._add(name, value.detach().sum())
        # DistributedDataParallel averages over ranks what is to be a sum.
        loss: Tensor = values["loss"].sum() / num_items_in_batch * self.args.world_size
        return loss if inputs["real"] else loss * 0

    def _pair_values(self, model: nn.Module, rows: PackedRows) -> dict[str, Tensor]:
        """Return the loss of each pair of a micro-batch, and what is logged of it, [pairs] each."""
        self._use_layout(self.model)
        log_probs, *aux = model(packed=rows, aux_loss=True) if self.aux_loss_enabled else (model(packed=rows),)
        ratio = log_probs - rows.reference
        pairs = Pairs(ratio[rows.chosen], ratio[rows.rejected], rows.lengths[rows.chosen], rows.lengths[rows.rejected])
        settings = LossSettings(self.loss_types[0], self.beta, self.label_smoothing)
        losses = rows.weights * pair_losses(pairs, settings)
        chosen, rejected = self.beta * pairs.chosen.detach(), self.beta * pairs.rejected.detach()
        values = {
            "loss": losses, "pairs": torch.ones_like(chosen), "rewards/chosen": chosen, "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected, "rewards/accuracies": (chosen > rejected).float(),
            "logps/chosen": log_probs[rows.chosen], "logps/rejected": log_probs[rows.rejected], "weights": rows.weights,
        }  # fmt: skip
        for aux_loss in aux:
            values |= {"loss": losses + self.router_aux_loss_coef * aux_loss, "aux_loss": aux_loss.expand_as(chosen)}
        return values

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any
    ) -> tuple[Tensor, None, None]:
        """Evaluate a batch; `evaluation_loop` makes the means."""
        losses: list[Tensor] = []
        with torch.no_grad(), self.compute_loss_context_manager():
            for rows, real, _last in self._rounds(inputs["batch"]):
                values = self._pair_values(model, rows)
                if real:
                    losses.append(values["loss"])
                    self._evaluated.append((rows.pair_ids.cpu(), torch.stack([*values.values()], 1).float().cpu()))
        self._eval_names = list(values)
        return torch.cat(losses).mean(), None, None

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """Evaluate, and return the exact means over the pairs of the dataset under the name that was asked for."""
        if "pair_ids" not in dataloader.dataset.column_names:
            raise PersodpoError("predict takes a dataset of this trainer, such as trainer.eval_dataset; use evaluate.")
        self._evaluated = []
        output = super().evaluation_loop(dataloader, *args, **kwargs)
        if not any(gather_object([bool(self._evaluated)])):
            raise PersodpoError(
                "No pair was evaluated, as dataloader_drop_last leaves out a batch that is not full; lower "
                "per_device_eval_batch_size or unset it."
            )
        ids, values = (torch.cat(parts) for parts in zip(*gather_object(self._evaluated), strict=True))
        rows = without_filling(ids.numpy(), dataloader.dataset["pair_ids"])
        means = dict(zip(self._eval_names, values[rows].double().mean(0).tolist(), strict=True))
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics.update({f"{prefix}_{name}": mean for name, mean in means.items() if name != "pairs"})
        return output

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as TRL's trainer; a dataset that is new is grouped first.

        Raises:
            PersodpoError: The dataset is a stream, or its reference is gone, as all weights have changed.
        """
        parts = list(eval_dataset.values()) if isinstance(eval_dataset, dict) else [eval_dataset]
        sets = list(self.eval_dataset.values()) if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        own = {id(one) for one in (self.train_dataset, *sets)}
        are_known = [id(part) in own or not isinstance(part, Dataset | IterableDataset) for part in parts]
        # Of several, transformers gives each back by itself.
        if all(are_known) or (any(are_known) and isinstance(eval_dataset, dict)):
            return super(DPOTrainer, self).evaluate(eval_dataset, *args, **kwargs)  # type: ignore[no-any-return]
        if self.ref_model is None and not trains_adapters_alone(self.model) and self._has_changed():
            raise PersodpoError(
                "The reference of this dataset cannot be computed any more, as its weights have changed; pass ref_model (a "
                "copy of the starting policy), or name the dataset as eval_dataset from the start."
            )
        return super().evaluate(eval_dataset, *args, **kwargs)  # type: ignore[no-any-return]

    def _has_changed(self) -> bool:
        """Tell whether the weights are no longer those of the start, by training or by hand."""
        return self.state.global_step > 0 or bool(hash_module(self.model) != self._precompute_model_hash)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Estimate a batch as transformers does, by parameters and positions."""
        positions: int = sum(rows.input_ids.numel() for rows in inputs["batch"].rows)
        model: Any = self.accelerator.unwrap_model(self.model)
        return 6 * positions * int(model.num_parameters(exclude_embeddings=True))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log means over the pairs of all ranks since the last log, under TRL's names."""
        if self.model.training and "pairs" in self._sums:
            sums, self._sums = self._sums, {}
            names = sorted(sums)
            totals = self.accelerator.gather(torch.stack([sums[name].double() for name in names])[None]).sum(0)
            means = dict(zip(names, (totals / totals[names.index("pairs")]).tolist(), strict=True))
            self._total_train_tokens += round(float(totals[names.index("tokens")]))
            self._metrics["train"].update(
                {name: [mean] for name, mean in means.items() if name not in {"pairs", "loss", "tokens"}}
            )
            self._metrics["train"]["num_tokens"] = [float(self._total_train_tokens)]
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as transformers does, unless a weight is not a number."""
        if not all(bool(torch.isfinite(weight).all()) for weight in self.model.parameters() if weight.requires_grad):
            raise PersodpoError(
                f"A weight is not a number after step {self.state.global_step}, so nothing is saved; lower the learning "
                f"rate. The last checkpoint in {self.args.output_dir} is from before."
            )
        super().save_model(output_dir, _internal_call)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write TRL's card, and what it does not know."""
        super().create_model_card(*args, **kwargs)
        path = Path(self.args.output_dir) / "README.md"
        if not self.is_world_process_zero() or self.packing is None or not path.is_file():
            return
        text = described(self.args, self.skipped, grouped=self.packing.grouped)
        path.write_text(path.read_text(encoding="utf-8") + text, encoding="utf-8")
