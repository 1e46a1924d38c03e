"""What a treatment adds to the engine's forward; called before and after verl's.

    prepare   recorded latents ──(recompute: a pass each, through the FSDP root)──▶ latents to feed
              tap armed
    verl's forward
    extend    log_probs[t] at latents = their log-density;  statistics, for the loss's components;
              in the old policy's pass, how far its means are from what was recorded

A treatment's own parameters are applied within the forward, by the tap. Nothing here runs in an
update with treatment `mask` and no anchor.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor
from verl.utils.device import get_device_name

from grpo_latent.latent.treatments import LatentSource, LatentTerms, Treatment
from grpo_latent.models.injection import LatentInjector
from grpo_latent.models.recompute import latents_by_passes
from grpo_latent.models.sequences import LatentSequences
from grpo_latent.models.sources import SourceTap
from grpo_latent.recorded_fields import field
from grpo_latent.trajectory import PositionKind
from grpo_latent.verl_plugin.worker.micro_batch import MicroBatch

MEANS, REF_MEANS = "latent_means", field("ref_latent_means").column
STATE_ERRORS = "latent_state_errors"


class TreatedForward:
    """The treatment's part of one engine.

    Args:
        module: before any FSDP wrapping.
        engine: read for `module` (wrapped), autocast dtype and data-parallel group when a forward
            runs.
    """

    def __init__(
        self, engine, module, injector: LatentInjector, treatment: Treatment, terms: LatentTerms
    ):
        self.engine = engine
        self.injector = injector
        self.treatment = treatment
        self.gives_statistics = treatment.reads_statistics(terms)
        self.taps = treatment.is_action or self.gives_statistics
        # the reference's means are not what was recorded; neither is a latent that was drawn
        # around its mean
        self.measures = treatment.feeds_mean and not engine.engine_config.forward_only
        needs_tap = self.taps or self.measures or treatment.gradient is not None
        self.tap = SourceTap.install(module, engine.mechanism) if needs_tap else None

    def prepare(
        self, model_inputs: dict, sequences: LatentSequences, batch: MicroBatch, trains: bool
    ) -> LatentSequences:
        """The sequences with the latents to inject into the forward of `model_inputs`."""
        if trains and self.treatment.gradient is not None:
            num_passes = self._over_ranks(max(batch.num_own))
            make = partial(self._make, model_inputs)
            sequences = sequences.with_latents(
                latents_by_passes(
                    sequences,
                    self.engine.mechanism,
                    num_passes,
                    self.treatment.gradient,
                    make,
                )
            )
        if self.taps or (self.measures and not trains):
            features = self.treatment.features if self.taps else None
            self._tap.arm(
                *sequences.sources(self.engine.mechanism),
                wants_logits=self.treatment.reads_logits,
                features=features,
            )
        return sequences

    @property
    def _tap(self) -> SourceTap:
        assert self.tap is not None, "installed wherever something is read of it"
        return self.tap

    def _over_ranks(self, count: int) -> int:
        """The largest count of all ranks.

        Each must run the same number of forwards, or their collectives do not meet.
        """
        counts = torch.tensor(count, device=get_device_name())
        group = self.engine.get_data_parallel_group()
        torch.distributed.all_reduce(counts, op=torch.distributed.ReduceOp.MAX, group=group)
        return int(counts)

    def _make(
        self, model_inputs: dict, first: LatentSequences, rows_M: Tensor, columns_M: Tensor
    ) -> Tensor:
        """float [M, H] of one pass of `latents_by_passes` over the columns of `first`.

        It goes through the FSDP root, as verl's own forward does: only that gathers the shards.
        """
        inputs = model_inputs
        if not first.is_packed:  # packed rows stand one after the other: no column ends them all
            inputs = _first_columns(model_inputs, first.kinds_BT.shape[1])
        self.injector.arm(first.recorded_mask_BT, first.latents_NH)
        self._tap.arm(rows_M, columns_M, is_sources_only=True)
        with self._autocast():
            self.engine.module(**inputs, use_cache=False)
        return self._tap.take().means_MH

    def _autocast(self):
        dtype = self.engine._autocast_dtype
        return (
            nullcontext()
            if dtype == torch.float32
            else torch.autocast(device_type=get_device_name(), dtype=dtype)
        )

    def extend(
        self,
        model_output: dict,
        output_args: dict,
        batch: MicroBatch,
        sequences: LatentSequences,
        trains: bool,
    ) -> None:
        """Writes log-densities over the log-probs of placeholder ids, and adds the statistics."""
        measures = self.measures and not trains
        if not self.taps and not measures:
            return
        taken = self._tap.take()
        recorded_MH = batch.latents_NH[
            sequences.is_made_N
        ]  # `sequences` may hold the current policy's own
        if measures:
            model_output[STATE_ERRORS] = batch.by_row(state_errors(taken.means_MH, recorded_MH))
        if not self.taps:
            return
        temperature_M1 = _temperatures(output_args, *sequences.sources(self.engine.mechanism))[
            :, None
        ]

        def logits_MV() -> Tensor:
            assert taken.logits_MV is not None, "asked for by a treatment that `reads_logits`"
            return taken.logits_MV.float() / temperature_M1

        source = LatentSource(taken.means_MH, logits_MV, taken.features_MF)
        if self.treatment.is_action:
            aux_MA = (
                batch.latent_aux_MA(self.treatment.aux_size) if self.treatment.aux_size else None
            )
            density_M = self.treatment.log_density(source, recorded_MH, aux_MA)
            log_probs = model_output["log_probs"]
            model_output["log_probs"] = batch.with_scores(
                log_probs, PositionKind.LATENT, density_M
            )
        if self.gives_statistics:
            # the reference scores after the old policy: under this name its own are what the
            # update finds
            statistics_MS = self.treatment.statistics(source).float()
            model_output[MEANS if trains else REF_MEANS] = batch.by_row(statistics_MS)

    def disarm(self) -> None:
        if self.tap is not None:
            self.tap.disarm()


def state_errors(means_MH: Tensor, recorded_MH: Tensor) -> Tensor:
    """float32 [M, 2]: max |mean - recorded| of each latent, and |mean - recorded| / |recorded|."""
    difference_MH, recorded_MH = (means_MH.float() - recorded_MH.float()), recorded_MH.float()
    relative_M = difference_MH.norm(dim=-1) / recorded_MH.norm(dim=-1).clamp(
        min=torch.finfo(torch.float32).tiny
    )
    return torch.stack([difference_MH.abs().amax(-1), relative_M], dim=-1)


def _first_columns(model_inputs: dict, length: int) -> dict:
    """The model's padded inputs, cut to the first `length` columns."""
    mask = model_inputs["attention_mask"]
    cut = {name: model_inputs[name][..., :length] for name in ("input_ids", "position_ids")}
    cut["attention_mask"] = mask[..., :length, :length] if mask.ndim == 4 else mask[:, :length]
    return {**model_inputs, **cut}


def _temperatures(output_args: dict, rows_M: Tensor, columns_M: Tensor) -> Tensor:
    """float [M], the sampling temperature at each source.

    verl keeps one a row (padded) or one a position (packed).
    """
    if "temperature" in output_args:
        return output_args["temperature"][rows_M]
    return output_args["temperature_rmpad"][columns_M]
