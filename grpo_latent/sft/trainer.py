"""LVR's stage 1 on the Hugging Face Trainer (2509.24251 section 3.1).

    batch ──model(sft_batch=…)──▶ sums of CE, latent loss, end BCE ──/ counts of the whole step──▶ loss ──▶ Trainer

The Trainer brings the loop, accumulation, distribution and logging. Replaced are the loss and its denominators, the data
order (a function of seed and epoch), and how a checkpoint is written and read: transformers 5.10 saves a Qwen2-VL model
under the hub's names and resumes by the model's own, so that its resume would load one weight in fifty, with a warning.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from grpo_latent.errors import CheckpointError, ConfigError, TrainingError
from grpo_latent.models.adapter import ImageInputs, ModelAdapter
from grpo_latent.models.loading import LatentModel, read_tensors
from grpo_latent.models.vision_cache import VisionCache
from grpo_latent.sft.common.losses import LossConfig, target_variance
from grpo_latent.sft.common.parameters import has_lora, vision_is_frozen
from grpo_latent.sft.common.sampler import SeededBatchSampler
from grpo_latent.sft.lvr.collator import collate
from grpo_latent.sft.lvr.forward import SFT_KEYWORD, route_sft_batches, sft_sums, visual_embeddings
from grpo_latent.sft.lvr.rows import IGNORED, SFTDataset

VARIANCE_ROWS = 256  # rows whose targets estimate the variance of all
_METRICS = ("ce", "labels", "latent", "end", "latents", "hits", "targets")


class LatentSFTTrainer(Trainer):
    """Trains `latent.model` on `dataset`.

    Args:
        labelled_per_batch: rows with an answer in each batch; None mixes all rows.
        horizon_steps: length of the learning-rate schedule, None for the training's own.
        vision_cache_bytes: bound of visual features kept across steps; needs a frozen tower and merger.
    """

    def __init__(
        self,
        latent: LatentModel,
        args: TrainingArguments,
        dataset: SFTDataset,
        loss_config: LossConfig,
        labelled_per_batch: int | None = None,
        horizon_steps: int | None = None,
        vision_cache_bytes: int = 0,
        callbacks: Sequence[TrainerCallback] = (),
    ):
        self.check(latent, loss_config)
        self.latent, self.loss_config = latent, loss_config
        self.labelled_per_batch, self.horizon_steps = labelled_per_batch, horizon_steps
        self.adapter = ModelAdapter(latent.model, latent.config.positions)
        if self.adapter.has_tower:
            VisionCache.install(latent.model, max_bytes=vision_cache_bytes)
        had_use_cache, use_cache = (
            hasattr(latent.model.config, "use_cache"),
            getattr(latent.model.config, "use_cache", 0),
        )
        args.remove_unused_columns = False  # it would drop our columns, which the model's own forward does not know
        self._epoch = _TellEpoch()
        super().__init__(model=latent.model, args=args, train_dataset=dataset, callbacks=[self._epoch, *callbacks])
        # the Trainer writes its own choice into the config, and from there it would go into the checkpoint
        if had_use_cache:
            latent.model.config.use_cache = use_cache
        else:
            del latent.model.config.use_cache
        self.model_accepts_loss_kwargs = (
            True  # the loss is divided by the counts of the whole step, not by micro-batches
        )
        self.target_variance = 1.0
        if loss_config.latent_loss_norm == "variance":
            self.target_variance = self._target_variance()
        self.remove_callback(PrinterCallback)  # the callbacks given here show the metrics
        self._undo_routing = route_sft_batches(latent.model, self._sums)
        self._metrics: dict[str, Tensor] = {}

    # what another system's SFT does differently

    def check(self, latent: LatentModel, loss_config: LossConfig) -> None:
        """Raises `ConfigError` where this training does not fit the checkpoint's latents."""
        check_exit(latent.config.exit, loss_config.end)

    def collate_rows(self, rows: Sequence) -> dict[str, Tensor]:
        return collate(rows)

    def count(self, batch: dict[str, Tensor]) -> Tensor:
        """int64 [2] on the CPU: labels and latents of a batch, which the loss is divided by."""
        return count_items(batch)

    def release(self) -> None:
        """Gives the model its own forward back, in eval mode."""
        self._undo_routing()
        self.latent.model.eval()

    def _target_variance(self) -> float:
        if not vision_is_frozen(self.latent.model):
            raise ConfigError(
                "the variance of targets that move",
                where="loss.latent_loss_norm",
                got="variance with a vision tower or merger that trains",
                expected="frozen targets",
                fix="Freeze vision and merger, or set loss.latent_loss_norm=none.",
            )
        dataset = self.train_dataset
        targets = []
        for index in np.linspace(0, len(dataset) - 1, min(VARIANCE_ROWS, len(dataset))).astype(int).tolist():
            row = dataset[index]
            if row.images is not None:
                device = self.adapter.device
                images = ImageInputs(row.images.pixel_values.to(device), row.images.image_grid_thw.to(device))
                with torch.no_grad():
                    visual_MH = visual_embeddings(self.adapter, images)
                targets.append(visual_MH[row.roi_N[row.roi_N >= 0].to(device)])
        return target_variance(torch.cat(targets) if targets else torch.zeros(0, self.adapter.hidden_size))

    def _sums(self, batch: dict[str, Tensor], count_hits: bool) -> dict[str, Tensor]:
        return sft_sums(
            self.adapter, batch, self.latent.config, self.loss_config, self.target_variance, count_hits=count_hits
        )

    # data

    def get_train_dataloader(self) -> DataLoader:
        args = self.args
        seed = args.seed if args.data_seed is None else args.data_seed
        sampler = SeededBatchSampler(
            self.train_dataset.has_answer, args.per_device_train_batch_size, seed, self.labelled_per_batch
        )
        self._epoch.sampler = sampler
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=sampler,
            collate_fn=self.collate_rows,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and torch.cuda.is_available(),
            persistent_workers=args.dataloader_persistent_workers,
        )
        return self.accelerator.prepare(loader)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """The step's micro-batches, and int64 [2]: labels and latents of the step over all processes."""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        counts = sum((self.count(batch) for batch in batches), torch.zeros(2, dtype=torch.long)).to(device)
        if self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, "sum")
        return batches, counts

    # loss

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch=None):
        count_hits = (self.state.global_step + 1) % max(int(self.state.logging_steps or 1), 1) == 0
        sums = model(**{SFT_KEYWORD: inputs, "count_hits": count_hits})
        own_counts = self.count(inputs)
        counts = own_counts if num_items_in_batch is None else num_items_in_batch
        num_labels, num_latents = counts.clamp(min=1).tolist()
        latent_terms = self.loss_config.latent_weight * sums["latent"]
        if "end" in sums:
            latent_terms = latent_terms + self.loss_config.end_weight * sums["end"]
        # data parallelism averages gradients over the processes, while the counts are already those of all of them
        loss = (sums["ce"] / num_labels + latent_terms / num_latents) * self.args.world_size
        if not torch.isfinite(loss):
            raise TrainingError(
                "the loss is not finite",
                where=f"SFT step {self.state.global_step + 1}",
                got={name: float(value.detach()) for name, value in sums.items()},
                expected="finite sums",
                fix="Lower trainer.learning_rate, or look at the rows of this step.",
            )
        self._add_metrics(sums, own_counts)
        return (loss, {"loss": loss}) if return_outputs else loss

    def _add_metrics(self, sums: dict[str, Tensor], own_counts: Tensor) -> None:
        values = dict(zip(("labels", "latents"), own_counts, strict=True)) | sums
        values["targets"] = values.pop("num_targets", 0.0)
        for name in _METRICS:
            value = torch.as_tensor(values.get(name, 0.0)).detach().double().cpu()
            self._metrics[name] = self._metrics.get(name, 0.0) + value

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._metrics:
            totals = torch.stack([self._metrics[name] for name in _METRICS])
            if self.args.world_size > 1:
                totals = self.accelerator.reduce(totals.to(self.args.device), "sum").cpu()
            total = dict(zip(_METRICS, totals.tolist(), strict=True))
            logs["ce"] = total["ce"] / max(total["labels"], 1)
            logs["latent_loss"] = total["latent"] / max(total["latents"], 1)
            if self.loss_config.end == "mode_switch":
                logs["end_loss"] = total["end"] / max(total["latents"], 1)
            if total["targets"]:
                logs["latent_hit"] = total["hits"] / total["targets"]
            self._metrics = {}
        super().log(logs, start_time)

    # optimization

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        exempt = {name for name, parameter in model.named_parameters() if getattr(parameter, "no_weight_decay", False)}
        return [name for name in super().get_decay_parameter_names(model) if name not in exempt]

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        return super().create_scheduler(self.horizon_steps or num_training_steps, optimizer)

    # checkpoints

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Weights under the model's own names; a latent checkpoint of its own unless adapters are in it.

        The Trainer's pickled arguments are left out.
        """
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.latent.model.save_pretrained(folder, state_dict=state_dict, save_original_format=False)
        if not has_lora(self.latent.model):
            if self.latent.processor is not None:
                self.latent.processor.save_pretrained(folder)
            self.latent.tokenizer.save_pretrained(folder)
            self.latent.config.save(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_all_weights(self.latent.model, resume_from_checkpoint)


class _TellEpoch(TrainerCallback):
    """Tells the sampler its epoch: accelerate does not, where it skips the batches of an epoch that is resumed."""

    sampler: SeededBatchSampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.set_epoch(int(state.epoch or 0))


def check_exit(exit_rule: str, end: str) -> None:
    """Raises `ConfigError` where SFT would not train what the exit rule reads."""
    needed = {"latent_end": "latent_end", "end_token": "mode_switch"}.get(exit_rule)
    if needed is not None and end != needed:
        raise ConfigError(
            "the exit rule reads what SFT would not train",
            where="latent.exit, loss.end",
            got=f"exit {exit_rule} with end {end}",
            expected=f"loss.end={needed}",
            fix=f"Set loss.end={needed}, or latent.exit=steps.",
        )


def count_items(batch: dict[str, Tensor]) -> Tensor:
    """int64 [2] on the CPU: labels and latents of a batch."""
    return torch.tensor([int((batch["labels"] != IGNORED).sum()), batch["roi"].shape[0]])


@torch.no_grad()
def load_all_weights(model: nn.Module, folder: str) -> None:
    """Copies every weight of a folder into the model, by the model's own names.

    Raises:
        CheckpointError: a weight is missing, unknown, or of another shape.
    """
    own = model.state_dict(keep_vars=True)
    missing = {tensor.data_ptr() for tensor in own.values()}
    for name, tensor in read_tensors(folder, ("",)):
        if name not in own or own[name].shape != tensor.shape:
            expected = tuple(own[name].shape) if name in own else "a weight of the model"
            raise CheckpointError(
                "weight does not fit", where=f"{folder}: {name}", got=tuple(tensor.shape), expected=str(expected)
            )
        own[name].copy_(tensor)
        missing.discard(own[name].data_ptr())  # by address: tied weights are saved under one of their names
    if missing:
        names = sorted(name for name, tensor in own.items() if tensor.data_ptr() in missing)
        raise CheckpointError("weights are missing", where=folder, got=names[:5], expected="every weight of the model")
