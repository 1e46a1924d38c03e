"""The actor's loss with terms at latent positions, around verl's own: set by `set_loss_fn`, where verl lets a loss see data.

    text        response_mask          verl's ppo_loss, untouched
    latents     positions that act     clipped ratio of log-densities, KL to the reference's     `algo.losses`
    latents     LATENT                 anchor to the reference's predictions

Log-densities arrive in `log_probs`, `old_log_probs` and `ref_log_prob`, at positions where response_mask is False, so the
two parts cannot touch. Each latent term is reduced as the text's is (`loss_agg_mode`), over latents of the whole mini-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.utils.metric import AggregationType, Metric
from verl.workers.utils.padding import no_padding_2_padding

from grpo_latent.algo.anchor import anchor_distances
from grpo_latent.algo.losses import Denominators, aggregate, kl_penalty, policy_loss
from grpo_latent.errors import LatentMismatchError
from grpo_latent.latent.treatments import LatentTerms
from grpo_latent.trajectory import PositionKind
from grpo_latent.verl_plugin.worker.algo import AGGREGATION_OF_MODE, denominators
from grpo_latent.verl_plugin.worker.micro_batch import MicroBatch
from grpo_latent.verl_plugin.worker.treated_forward import MEANS, REF_MEANS

NUM_ACTS, NUM_LATENTS = "batch_num_latent_acts", "batch_num_latents"


@dataclass
class LatentLoss:
    """verl's loss function with latent terms; pickled to the workers.

    Attributes:
        text_loss: verl's `ppo_loss`, bound to the actor's config.
        act_kinds: kinds of positions that act and are not text.
    """

    text_loss: Callable
    terms: LatentTerms
    act_kinds: frozenset[int]
    loss_agg_mode: str
    loss_scale_factor: float | None = None

    def __call__(self, model_output: dict, data: TensorDict, dp_group=None) -> tuple[Tensor, dict]:
        loss, metrics = self.text_loss(model_output=model_output, data=data, dp_group=dp_group)
        batch = MicroBatch(data)
        added, values = loss.new_zeros(()), {}
        if self.act_kinds:
            act_loss, values = self._act_terms(model_output, batch)
            added = added + act_loss
        if self.terms.anchor_weight:
            values["anchor"] = self._anchor(model_output, batch)
            added = added + self.terms.anchor_weight * values["anchor"]
        # FSDP averages over ranks: each rank's share of the global sum is scaled up for that
        scale = data["dp_size"]
        for name, value in values.items():
            metrics[f"latent/{name}"] = Metric(value=value.detach() * scale, aggregation=AggregationType.SUM)
        return loss + added * scale, metrics

    def count(self, data: TensorDict) -> Tensor:
        """int64 [2]: positions that act, and LATENT ones, over the live rows; the terms are means over all ranks' sums."""
        batch = MicroBatch(data)
        kinds_BT, is_live_B1 = batch.response_kinds_BT, batch.is_live_B[:, None]
        wanted = (self.act_kinds, frozenset({int(PositionKind.LATENT)}))
        return torch.stack([(is_kind(kinds_BT, kinds) & is_live_B1).sum() for kinds in wanted])

    def _reduction(self, mask_BT: Tensor, data: TensorDict, count: str) -> dict:
        info = {
            "dp_size": data["dp_size"],
            "batch_num_tokens": data[count],
            "global_batch_size": data["global_batch_size"],
            "loss_scale_factor": self.loss_scale_factor,
        }
        mode = AGGREGATION_OF_MODE[self.loss_agg_mode]
        return {"aggregation": mode, "denominators": denominators(mask_BT, self.loss_agg_mode, info)}

    def _act_terms(self, model_output: dict, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        terms = self.terms
        acts_BT = is_kind(batch.response_kinds_BT, self.act_kinds) & batch.is_live_B[:, None]
        reduction = self._reduction(acts_BT, batch.data, NUM_ACTS)
        log_probs_BT = no_padding_2_padding(model_output["log_probs"], batch.data)
        old_BT = batch.old_log_probs_BT
        result = policy_loss(
            log_probs_BT,
            old_BT,
            batch.advantages_B,
            acts_BT,
            clip_low=terms.clip_low,
            clip_high=terms.clip_high,
            clip_ratio_c=terms.clip_ratio_c,
            log_ratio_bound=terms.log_ratio_bound,
            **reduction,
        )
        loss = terms.weight * result.loss
        shares = Denominators(max(batch.data[NUM_ACTS], 1), 1)
        share = lambda values_BT: aggregate(values_BT.detach().float(), acts_BT, "token_mean", shares)  # noqa: E731
        log_ratio_BT = (log_probs_BT - old_BT).clamp(-terms.log_ratio_bound, terms.log_ratio_bound)
        local_share = float(acts_BT.sum()) / shares.num_tokens
        values = {
            "pg_loss": result.policy_loss,
            "ratio_mean": share(log_ratio_BT.exp()),
            "clipfrac": result.clipfrac * local_share,
            "clipfrac_lower": result.clipfrac_lower * local_share,
            "log_density": share(log_probs_BT),
        }
        ref_BT = batch.ref_log_probs_BT
        if ref_BT is not None:
            kl_BT = kl_penalty(log_probs_BT, ref_BT, acts_BT, terms.kl_kind, terms.log_ratio_bound)
            values["kl"] = aggregate(kl_BT, acts_BT, **reduction)
            loss = loss + terms.kl_coef * values["kl"] if terms.kl_coef else loss
        return loss, values

    def _anchor(self, model_output: dict, batch: MicroBatch) -> Tensor:
        ref_means_MH = batch.ref_latent_means_MH
        if ref_means_MH is None:
            raise LatentMismatchError(
                "no reference for the latent anchor",
                where="actor update",
                got=f"no {REF_MEANS} in the batch",
                expected="the reference's predictions",
                fix="Set actor_rollout_ref.actor.use_kl_loss=true (kl_loss_coef=0 leaves the text's KL out).",
            )
        distance_M = anchor_distances(model_output[MEANS].values(), ref_means_MH)
        is_latent_BT = batch.response_kinds_BT == PositionKind.LATENT
        distances_BT = distance_M.new_zeros(is_latent_BT.shape).masked_scatter(is_latent_BT, distance_M)
        counts_BT = is_latent_BT & batch.is_live_B[:, None]
        return aggregate(distances_BT, counts_BT, **self._reduction(counts_BT, batch.data, NUM_LATENTS))


def is_kind(kinds: Tensor, wanted: frozenset[int]) -> Tensor:
    """bool, True where a kind is one of `wanted`."""
    return torch.isin(kinds, torch.tensor(sorted(wanted), dtype=kinds.dtype, device=kinds.device))
