"""What a treatment of latents adds to the engine's forward; `LatentFSDPEngine` calls it before and after verl's.

    prepare   recorded latents ──(recompute: one forward a latent, through the FSDP root)──▶ latents to inject
              tap armed
    verl's forward
    extend    log_probs[t] at latents = their log-density;  statistics, for the loss's components;
              in the old policy's pass, how far its means are from what was recorded

A treatment's own parameters are applied within the forward, by the tap. Nothing here runs in an update with treatment `mask`
and no anchor.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from verl.utils.device import get_device_name

from grpo_latent.latent.treatments import LatentSource, LatentTerms, Treatment
from grpo_latent.models.injection import LatentInjector
from grpo_latent.models.shift import latent_sources
from grpo_latent.models.sources import SourceTap, own_latents_of
from grpo_latent.recorded import field
from grpo_latent.trajectory import PositionKind, latent_mask
from grpo_latent.verl_plugin.worker.micro_batch import MicroBatch

MEANS, REF_MEANS = "latent_means", field("ref_latent_means").column
STATE_ERRORS = "latent_state_errors"


class TreatedForward:
    """The treatment's part of one engine.

    Args:
        module: before any FSDP wrapping.
        engine: read for `module` (wrapped), autocast dtype and data-parallel group when a forward runs.
    """

    def __init__(self, engine, module, injector: LatentInjector, treatment: Treatment, terms: LatentTerms):
        self.engine, self.injector, self.treatment = engine, injector, treatment
        self.gives_statistics = treatment.reads_statistics(terms)
        self.taps = treatment.is_action or self.gives_statistics
        # the reference's means are not what was recorded; neither is a latent that was drawn around its mean
        self.measures = treatment.feeds_mean and not engine.engine_config.forward_only
        needs_tap = self.taps or self.measures or treatment.gradient is not None
        self.tap = SourceTap.install(module) if needs_tap else None

    def prepare(self, model_inputs: dict, kinds_BT: Tensor, batch: MicroBatch, trains: bool) -> Tensor:
        """The latents [N, H] to inject into the forward that follows."""
        latents_NH = batch.latents_NH
        if trains and self.treatment.gradient is not None:
            num_passes = self._over_ranks(max(batch.num_own))
            latents_NH = self._own_latents(model_inputs, kinds_BT, latents_NH, num_passes)
        if self.taps or (self.measures and not trains):
            features = self.treatment.features if self.taps else None
            self.tap.arm(*latent_sources(kinds_BT), wants_logits=self.treatment.reads_logits, features=features)
        return latents_NH

    def _over_ranks(self, count: int) -> int:
        """The largest of all ranks: each must run the same number of forwards, or their collectives do not meet."""
        counts = torch.tensor(count, device=get_device_name())
        group = self.engine.get_data_parallel_group()
        torch.distributed.all_reduce(counts, op=torch.distributed.ReduceOp.MAX, group=group)
        return int(counts)

    def _own_latents(self, model_inputs: dict, kinds_BT: Tensor, latents_NH: Tensor, num_passes: int) -> Tensor:
        """The current policy's latents, with the treatment's gradient.

        Each pass makes all latents anew from those of the pass before. A row's k-th latent depends on the earlier ones only,
        so it is exact after k passes, whatever the recorded ones were; so is its gradient, if all passes carry one.
        """
        if num_passes == 0:
            return latents_NH
        mask_BT, (rows, columns) = latent_mask(kinds_BT), latent_sources(kinds_BT)
        own_M = (kinds_BT == PositionKind.LATENT)[mask_BT].nonzero()[:, 0]
        is_packed = model_inputs["attention_mask"] is None  # rows end one after the other: nothing can be cut
        length = kinds_BT.shape[1] if is_packed else _needed_columns(kinds_BT, columns)
        inputs = model_inputs if is_packed else _first_columns(model_inputs, length)
        is_fed_N = mask_BT.nonzero()[:, 1] < length

        def made_from(latents_NH: Tensor) -> Tensor:
            self.injector.arm(mask_BT[:, :length], latents_NH[is_fed_N])
            self.tap.arm(rows, columns, is_sources_only=True)
            with self._autocast():
                self.engine.module(**inputs, use_cache=False)
            means_MH = self.tap.take().means_MH
            return latents_NH.index_copy(0, own_M, means_MH.to(latents_NH.dtype))

        with nullcontext() if self.treatment.gradient == "bptt" else torch.no_grad():
            for _ in range(num_passes):
                latents_NH = made_from(latents_NH)
        return made_from(latents_NH) if self.treatment.gradient == "one_hop" else latents_NH

    def _autocast(self):
        dtype = self.engine._autocast_dtype
        return nullcontext() if dtype == torch.float32 else torch.autocast(device_type=get_device_name(), dtype=dtype)

    def extend(self, model_output: dict, output_args: dict, batch: MicroBatch, kinds_BT: Tensor, trains: bool):
        """Writes log-densities into `log_probs`, where verl has that of a placeholder id, and adds the statistics."""
        measures = self.measures and not trains
        if not self.taps and not measures:
            return
        taken = self.tap.take()
        recorded_MH = own_latents_of(kinds_BT, batch.latents_NH)
        if measures:
            model_output[STATE_ERRORS] = batch.by_row(state_errors(taken.means_MH, recorded_MH))
        if not self.taps:
            return
        temperature_M1 = _temperatures(output_args, *latent_sources(kinds_BT))[:, None]
        source = LatentSource(taken.means_MH, lambda: taken.logits_MV.float() / temperature_M1, taken.features_MF)
        if self.treatment.is_action:
            aux_MA = batch.latent_aux_MA(self.treatment.aux_size) if self.treatment.aux_size else None
            density_M = self.treatment.log_density(source, recorded_MH, aux_MA)
            log_probs = model_output["log_probs"]
            model_output["log_probs"] = batch.with_scores(log_probs, PositionKind.LATENT, density_M)
        if self.gives_statistics:
            # the reference scores after the old policy: under this name its own are what the update finds
            statistics_MS = self.treatment.statistics(source).float()
            model_output[MEANS if trains else REF_MEANS] = batch.by_row(statistics_MS)

    def disarm(self) -> None:
        if self.tap is not None:
            self.tap.disarm()


def state_errors(means_MH: Tensor, recorded_MH: Tensor) -> Tensor:
    """float32 [M, 2]: max |mean - recorded| of each latent, and |mean - recorded| / |recorded|."""
    difference_MH, recorded_MH = (means_MH.float() - recorded_MH.float()), recorded_MH.float()
    relative_M = difference_MH.norm(dim=-1) / recorded_MH.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.stack([difference_MH.abs().amax(-1), relative_M], dim=-1)


def _needed_columns(kinds_BT: Tensor, columns_M: Tensor) -> int:
    """Columns up to the last source; all images must be among them, and a batch without latents runs whole."""
    if columns_M.numel() == 0:
        return kinds_BT.shape[1]
    images = (kinds_BT == PositionKind.VISION).any(0).nonzero()
    return max(int(columns_M.max()), int(images.max()) if images.numel() else 0) + 1


def _first_columns(model_inputs: dict, length: int) -> dict:
    """The model's padded inputs, cut to the first `length` columns."""
    mask = model_inputs["attention_mask"]
    cut = {name: model_inputs[name][..., :length] for name in ("input_ids", "position_ids")}
    cut["attention_mask"] = mask[..., :length, :length] if mask.ndim == 4 else mask[:, :length]
    return {**model_inputs, **cut}


def _temperatures(output_args: dict, rows_M: Tensor, columns_M: Tensor) -> Tensor:
    """The sampling temperature at each source: verl keeps one a row (padded) or one a position (packed)."""
    if "temperature" in output_args:
        return output_args["temperature"][rows_M]
    return output_args["temperature_rmpad"][columns_M]
