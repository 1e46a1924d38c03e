"""SFT on the Hugging Face Trainer: what all methods share.

    rows ──collate_rows──▶ batch ──model(sft_batch=…)──▶ loss_sums ──/ counts of the step──▶ loss

The Trainer brings the loop, accumulation, distribution and logging. Replaced are the loss and its
denominators, the data order (a function of seed and epoch), and how a checkpoint is written and
read: transformers 5.10 saves a Qwen2-VL model under the hub's names and resumes by the model's
own, so that its resume would load one weight in fifty, with a warning.

A method derives its trainer from `LatentSFTTrainer` and says four things: which checkpoints it
takes (`check`), how rows become a batch (`collate_rows`), what a batch's losses are divided by
(`count`), and the losses (`loss_sums`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedConfig,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from grpo_latent.common.manifest import say_once, write_manifest
from grpo_latent.common.pickles import without_code
from grpo_latent.errors import TrainingError
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.loading import LatentModel, copy_weights, read_tensors
from grpo_latent.models.vision_cache import VisionCache
from grpo_latent.sft.common.dataset import SFTDataset
from grpo_latent.sft.common.parameters import NO_DECAY, has_lora
from grpo_latent.sft.common.routing import SFT_KEYWORD, route_sft_batches
from grpo_latent.sft.common.sampler import SeededBatchSampler
from grpo_latent.sft.common.sharding import JoinedForwards, embeddings_in_the_root, plugin_values
from grpo_latent.sft.common.shards import (
    named,
    optimizer_tensors,
    read_optimizer,
    read_shards,
    saved_world_size,
    write_shards,
)


class LatentSFTTrainer(Trainer):
    """Trains `latent.model` on `dataset`: CE over labels, plus weighted terms over latents.

    Args:
        loss_config: the method's `loss` section.
        labelled_per_batch: rows with an answer in each batch; None mixes all rows.
        horizon_steps: length of the learning-rate schedule, None for the training's own.
        vision_cache_bytes: bound of visual features kept across steps; needs a frozen tower and
            merger.
    """

    # sums kept since the last logged step
    summed: ClassVar[tuple[str, ...]] = ("ce", "labels", "latent", "latents")

    def __init__(
        self,
        latent: LatentModel,
        args: TrainingArguments,
        dataset: SFTDataset,
        loss_config: Any,
        labelled_per_batch: int | None = None,
        horizon_steps: int | None = None,
        vision_cache_bytes: int = 0,
        callbacks: Sequence[TrainerCallback] = (),
    ):
        self.latent = latent
        self.dataset = dataset
        self.loss_config = loss_config
        # before anything is installed in the model: a refusal leaves it as it was
        self.check(latent)
        self.labelled_per_batch = labelled_per_batch
        self.horizon_steps = horizon_steps
        self.adapter = ModelAdapter(latent.model, latent.mechanism)
        if self.adapter.backbone.caches_tower:
            VisionCache.install(latent.model, max_bytes=vision_cache_bytes)
        # it would drop our columns, which the model's own forward does not know
        args.remove_unused_columns = False
        self._epoch = _TellEpoch()
        with _keeping_use_cache(latent.model.config):
            super().__init__(
                model=latent.model,
                args=args,
                train_dataset=dataset,
                callbacks=[self._epoch, *callbacks],
            )
        # our loss is divided by counts of the whole step: the Trainer must not divide again
        self.model_accepts_loss_kwargs = True
        self.remove_callback(PrinterCallback)  # the callbacks given here show the metrics
        compute = self.loss_sums
        if self.is_fsdp_enabled:
            compute = JoinedForwards(self.adapter).around(compute)
        self._undo_routing = route_sft_batches(latent.model, compute)
        self._totals: dict[str, Tensor] = {}

    # what a method says

    def check(self, latent: LatentModel) -> None:
        """Raises `ConfigError` where this training does not fit the checkpoint's latents."""
        raise NotImplementedError

    def collate_rows(self, rows: Sequence) -> Any:
        """Makes the batch of some rows, a dict of tensors once `get_batch_samples` has seen it."""
        raise NotImplementedError

    def count(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Counts labels and latents of a batch, the loss's denominators: int64 [2], on the CPU."""
        raise NotImplementedError

    def loss_sums(self, batch: dict[str, Tensor], count_hits: bool) -> dict[str, Tensor]:
        """Sums `ce` and the terms of `term_weights` over a batch, float32 scalars.

        Runs inside the model's own forward (`sft.common.routing`).

        Args:
            count_hits: whether the step is logged, for sums that only the log reads.
        """
        raise NotImplementedError

    def term_weights(self) -> dict[str, float]:
        """Returns the weights of the sums that are divided by the number of latents."""
        return {}

    def metrics(self, totals: dict[str, float]) -> dict[str, float]:
        """Makes what is logged of the totals (of `summed`) since the last logged step."""
        return {
            "ce": totals["ce"] / max(totals["labels"], 1),
            "latent_loss": totals["latent"] / max(totals["latents"], 1),
        }

    def release(self) -> None:
        """Gives the model its own forward back, in eval mode."""
        self._undo_routing()
        self.latent.model.eval()

    # data

    def get_train_dataloader(self) -> DataLoader:
        args = self.args
        seed = args.seed if args.data_seed is None else args.data_seed
        batches_of_step = args.world_size * args.gradient_accumulation_steps
        sampler = SeededBatchSampler(
            self.dataset.has_answer,
            args.per_device_train_batch_size,
            seed,
            self.labelled_per_batch,
            # so that an epoch has the same steps at any number of processes
            multiple_of=batches_of_step if self.is_fsdp_enabled else 1,
        )
        self._epoch.sampler = sampler
        loader = DataLoader(
            self.dataset,
            batch_sampler=sampler,
            collate_fn=self.collate_rows,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and torch.cuda.is_available(),
            persistent_workers=args.dataloader_persistent_workers,
        )
        return self.accelerator.prepare(loader)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """Reads the step's micro-batches, and counts labels and latents over all processes."""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        counts = sum(
            (self.count(batch) for batch in batches), torch.zeros(2, dtype=torch.long)
        ).to(device)
        if self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, "sum")
        return batches, counts

    # shards

    def create_accelerator_and_postprocess(self) -> None:
        args = self.args
        if args.fsdp:
            args.fsdp_plugin_args |= plugin_values(self.adapter, args)
        super().create_accelerator_and_postprocess()
        if args.fsdp and args.use_cpu:
            # accelerate would fall back to whole copies on every process
            state = self.accelerator.state
            state.distributed_type = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**args.fsdp_plugin_args)
            self.is_fsdp_enabled = True

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> tuple[nn.Module, DataLoader]:
        with embeddings_in_the_root(self.latent.model) if self.is_fsdp_enabled else nullcontext():
            return super()._prepare_for_training(*args, **kwargs)

    def shards(self) -> dict[str, Tensor]:
        """Names what a sharded checkpoint holds beside the optimizer's."""
        return named("model", self.latent.model.state_dict())

    # loss

    def compute_loss(
        self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch=None
    ):
        # hits are for the log alone, and cost a distance to each visual token
        count_hits = (self.state.global_step + 1) % max(int(self.state.logging_steps or 1), 1) == 0
        # accelerate has autocast in a model that it wraps itself, not in one that FSDP2 shards
        with self.accelerator.autocast():
            sums = model(**{SFT_KEYWORD: inputs, "count_hits": count_hits})
        own_counts = self.count(inputs)
        counts = own_counts if num_items_in_batch is None else num_items_in_batch
        # a step may have no latents: its sums are 0 then, and 0 / 0 would be NaN
        num_labels, num_latents = counts.clamp(min=1).tolist()
        loss = sums["ce"] / num_labels
        terms = [weight * sums[name] for name, weight in self.term_weights().items()]
        if terms:
            loss = loss + sum(terms[1:], terms[0]) / num_latents
        # data parallelism averages gradients, while the counts are those of all processes
        loss = loss * self.args.world_size
        if not torch.isfinite(loss):
            raise TrainingError(
                "the loss is not finite",
                where=f"SFT step {self.state.global_step + 1}",
                got={name: float(value.detach()) for name, value in sums.items()},
                expected="finite sums",
                fix="Lower trainer.learning_rate, or look at the rows of this step.",
            )
        self._add_totals(sums, own_counts)
        return (loss, {"loss": loss}) if return_outputs else loss

    def _add_totals(self, sums: dict[str, Tensor], own_counts: Tensor) -> None:
        values = dict(zip(("labels", "latents"), own_counts, strict=True)) | sums
        for name in self.summed:
            value = torch.as_tensor(values.get(name, 0.0)).detach().double().cpu()
            self._totals[name] = self._totals.get(name, 0.0) + value

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # not for the summary at the end of training, which is of no step
        if "loss" in logs and self._totals:
            totals = torch.stack([self._totals[name] for name in self.summed])
            if self.args.world_size > 1:
                totals = self.accelerator.reduce(totals.to(self.args.device), "sum").cpu()
            logs |= self.metrics(dict(zip(self.summed, totals.tolist(), strict=True)))
            self._totals = {}
        super().log(logs, start_time)

    # optimization

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        exempt = {
            name
            for name, parameter in model.named_parameters()
            if getattr(parameter, NO_DECAY, False)
        }
        return [name for name in super().get_decay_parameter_names(model) if name not in exempt]

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ):
        return super().create_scheduler(self.horizon_steps or num_training_steps, optimizer)

    # checkpoints

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Writes weights under the model's own names; without adapters, a latent checkpoint.

        The Trainer's pickled arguments are left out.
        """
        place = output_dir or self.args.output_dir
        assert place is not None, "a Trainer that saves has an output_dir"
        folder = Path(place)
        folder.mkdir(parents=True, exist_ok=True)
        self.latent.model.save_pretrained(
            folder, state_dict=state_dict, save_original_format=False
        )
        if not has_lora(self.latent.model):
            if self.latent.processor is not None:
                self.latent.processor.save_pretrained(folder)
            self.latent.tokenizer.save_pretrained(folder)
            self.latent.mechanism.save(folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """The Trainer's, and a manifest once all processes have written their parts."""
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            folder = Path(self._get_output_dir(trial)) / name
            if folder.is_dir():  # a limit on their number may have removed it at once
                write_manifest(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        optimizer, schedule = self._optimizer_and_schedule()
        write_shards(output_dir, self.shards() | optimizer_tensors(self.latent.model, optimizer))
        if self.args.should_save:
            torch.save(schedule.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        if self.is_fsdp_enabled:
            read_shards(resume_from_checkpoint, self.shards())
        else:
            weights = read_tensors(resume_from_checkpoint, ("",))
            copy_weights(self.latent.model, weights, resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with without_code():
            if not self.is_fsdp_enabled or checkpoint is None:
                super()._load_optimizer_and_scheduler(checkpoint)
                return
            optimizer, schedule = self._optimizer_and_schedule()
            read_optimizer(checkpoint, self.latent.model, optimizer)
            schedule.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME))
        for group, rate in zip(optimizer.param_groups, schedule.get_last_lr(), strict=True):
            group["lr"] = rate

    def _optimizer_and_schedule(self) -> tuple[torch.optim.Optimizer, LRScheduler]:
        """The optimizer without accelerate's wrapper."""
        assert self.optimizer is not None and self.lr_scheduler is not None, "made to train"
        return getattr(self.optimizer, "optimizer", self.optimizer), self.lr_scheduler

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None and saved_world_size(checkpoint) != self.args.world_size:
            if self.args.should_save:
                say_once([_moved(saved_world_size(checkpoint), self.args.world_size)])
            return
        super()._load_rng_state(checkpoint)


class _TellEpoch(TrainerCallback):
    """Tells the sampler its epoch, which accelerate does not where it resumes within one."""

    sampler: SeededBatchSampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.set_epoch(int(state.epoch or 0))


def _moved(before: int, now: int) -> str:
    return (
        f"resumed by {now} processes what {before} wrote: weights, optimizer, teacher, schedule and "
        "data position go on; each process's random generators (noise, dropout) begin anew"
    )


@contextmanager
def _keeping_use_cache(config: PreTrainedConfig) -> Iterator[None]:
    """Undoes the Trainer's choice of `use_cache`, which would go into the checkpoint's config."""
    before = {"use_cache": config.use_cache} if hasattr(config, "use_cache") else {}
    yield
    if before:
        config.use_cache = before["use_cache"]
    else:
        del config.use_cache
