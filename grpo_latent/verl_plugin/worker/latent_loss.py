"""The actor's loss with components at latent positions, around verl's own.

`set_loss_fn` sets it, the one place where verl lets a loss see data.

    text      response_mask            verl's ppo_loss, untouched; refused if True at a latent
    latents   what the treatment says  its `components`, each a weight and one value a position

Log-densities arrive in `log_probs`, `old_log_probs` and `ref_log_prob`, at positions where
response_mask is False, so the two cannot touch. Each component is reduced as the text's loss
is (`loss_agg_mode`), over the whole mini-batch. With weight `by_count` both share one mean over
all positions that act, as if latents were tokens:

    (sum over text + sum over latents) / (N + A)
        = N / (N + A) mean of text + A / (N + A) mean of latents

Legend: B trajectories, T positions of completions, A acts, M latents, S statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.utils.metric import AggregationType, Metric
from verl.workers.utils.padding import no_padding_2_padding

from grpo_latent import recorded_fields
from grpo_latent.algo.losses import Denominators, aggregate, check_latents_do_not_act
from grpo_latent.errors import ConfigError, LatentMismatchError
from grpo_latent.latent.treatments import LatentTerms, Mask, Treatment
from grpo_latent.latent.treatments.loss_components import Acts, Component, LatentView
from grpo_latent.trajectory import PositionKind, latent_mask
from grpo_latent.verl_plugin.worker.algo import AGGREGATION_OF_MODE, denominators
from grpo_latent.verl_plugin.worker.finite import check_at, check_loss
from grpo_latent.verl_plugin.worker.micro_batch import MicroBatch, padded
from grpo_latent.verl_plugin.worker.treated_forward import MEANS

NUM_ACTS, NUM_LATENTS = "batch_num_latent_acts", "batch_num_latents"
COUNTS = {"acts": NUM_ACTS, "latents": NUM_LATENTS}


@dataclass
class LatentLoss:
    """verl's loss function with a treatment's components; pickled to the workers.

    Attributes:
        text_loss: verl's `ppo_loss`, bound to the actor's config.
        act_kinds: kinds of positions that act and are not text.
    """

    text_loss: Callable
    terms: LatentTerms
    act_kinds: frozenset[int]
    loss_agg_mode: str
    loss_scale_factor: float | None = None
    treatment: Treatment = field(default_factory=Mask)

    def __post_init__(self) -> None:
        if self.terms.is_by_count and self.loss_agg_mode != "token-mean":
            raise ConfigError(
                "one mean over text and latents is a mean over positions",
                where="latent.treatment.weight",
                got=f"{self.terms.weight} with loss_agg_mode {self.loss_agg_mode}",
                expected="actor_rollout_ref.actor.loss_agg_mode=token-mean",
            )

    def __call__(self, model_output: dict, data: TensorDict, dp_group=None) -> tuple[Tensor, dict]:
        batch = MicroBatch(data)
        check_latents_do_not_act(batch.response_mask_BT, latent_mask(batch.response_kinds_BT))
        check_at(data, self._inputs(model_output, batch), batch.response_mask_BT)
        loss, metrics = self.text_loss(model_output=model_output, data=data, dp_group=dp_group)
        masks = self._masks(batch)
        components = self.treatment.components(self._view(model_output, batch, masks), self.terms)
        check_components(components, masks)
        # FSDP averages over ranks: each rank's share of the global sum is scaled up for that
        scale = data["dp_size"]
        share = self._share(data)
        added = loss.new_zeros(())
        terms = {"loss of the text": loss}
        for component in components:
            value = self._reduced(component, masks[component.over], data)
            terms[f"loss component {component.name}"] = value
            if component.weight:
                weight = component.weight * (share if component.is_shared else 1.0)
                added = added + weight * value
            name = f"latent/{component.name}"
            metrics[name] = Metric(value=value.detach() * scale, aggregation=AggregationType.SUM)
        check_loss(data, terms)
        if self.terms.is_by_count:
            loss = (1 - share) * loss
        return loss + added * scale, metrics

    def _share(self, data: TensorDict) -> float:
        """What latents' mean is weighed by: their part of all positions that act, or 1."""
        if not self.terms.is_by_count:
            return 1.0
        num_acts, num_tokens = data[NUM_ACTS], data["batch_num_tokens"]
        return num_acts / max(num_acts + num_tokens, 1)

    def _inputs(self, model_output: dict, batch: MicroBatch) -> dict[str, Tensor]:
        """What the text's loss reads at actions, by its name in messages."""
        data = batch.data
        columns = {
            "old log-probs": "old_log_probs",
            "reference log-probs": recorded_fields.field("ref_log_probs").column,
            "advantages": "advantages",
        }
        return {
            "log-probs": no_padding_2_padding(model_output["log_probs"], data).detach(),
            **{n: padded(data[column]) for n, column in columns.items() if column in data.keys()},
        }

    def count(self, data: TensorDict) -> Tensor:
        """int64 [2], of the live rows in the order of `COUNTS`.

        A component is a mean over all ranks' sums, so the engine adds these up.
        """
        masks = self._masks(MicroBatch(data))
        return torch.stack([masks[over].sum() for over in COUNTS])

    def _masks(self, batch: MicroBatch) -> dict[str, Tensor]:
        """bool [B, T] of the positions of each `Component.over`."""
        is_live_B1 = batch.is_live_B[:, None]
        kinds = {"acts": self.act_kinds, "latents": frozenset({int(PositionKind.LATENT)})}
        return {
            over: is_kind(batch.response_kinds_BT, kinds[over]) & is_live_B1 for over in COUNTS
        }

    def _view(self, model_output: dict, batch: MicroBatch, masks: dict[str, Tensor]) -> LatentView:
        acts = None
        if self.act_kinds:
            acts_BT = masks["acts"]
            ref_BT = batch.ref_log_probs_BT
            acts = Acts(
                no_padding_2_padding(model_output["log_probs"], batch.data)[acts_BT],
                batch.old_log_probs_BT[acts_BT],
                None if ref_BT is None else ref_BT[acts_BT],
                batch.advantages_B[:, None].expand_as(acts_BT)[acts_BT],
            )
        if MEANS not in model_output:
            return LatentView(acts)
        # statistics have a row for every LATENT position; those of dropped trajectories are left
        # out
        is_latent_BT = batch.response_kinds_BT == PositionKind.LATENT
        is_live_M = masks["latents"][is_latent_BT]
        ref_MS = batch.ref_latent_means_MH
        return LatentView(
            acts,
            model_output[MEANS].values()[is_live_M],
            None if ref_MS is None else ref_MS[is_live_M],
        )

    def _reduced(self, component: Component, mask_BT: Tensor, data: TensorDict) -> Tensor:
        values_BT = component.values.new_zeros(mask_BT.shape).masked_scatter(
            mask_BT, component.values
        )
        num_positions = data[COUNTS[component.over]]
        if component.weight is None:
            return aggregate(
                values_BT.detach(), mask_BT, "token_mean", Denominators(max(num_positions, 1), 1)
            )
        info = {
            "dp_size": data["dp_size"],
            "batch_num_tokens": num_positions,
            "global_batch_size": data["global_batch_size"],
            "loss_scale_factor": self.loss_scale_factor,
        }
        mode = AGGREGATION_OF_MODE[self.loss_agg_mode]
        return aggregate(values_BT, mask_BT, mode, denominators(mask_BT, self.loss_agg_mode, info))


def check_components(components: list[Component], masks: dict[str, Tensor]) -> None:
    """Raises `LatentMismatchError` at what a treatment of one's own gets wrong.

    That is an unknown `over`, a name twice, a number of values that is not that of the positions.
    """
    names = [component.name for component in components]
    for component in components:
        known = component.over in masks
        expected = (int(masks[component.over].sum()),) if known else None
        if (
            not known
            or tuple(component.values.shape) != expected
            or names.count(component.name) > 1
        ):
            raise LatentMismatchError(
                "not a component of the loss",
                where=f"Treatment.components, component {component.name!r}",
                got=f"over {component.over!r}, values of shape "
                f"{tuple(component.values.shape)}, names {names}",
                expected=f"over one of {tuple(masks)}, values of shape {expected}, each name once",
                fix="Give one value for each position of view.acts or view.statistics_MS.",
            )


def is_kind(kinds: Tensor, wanted: frozenset[int]) -> Tensor:
    """bool, True where a kind is one of `wanted`."""
    return torch.isin(kinds, torch.tensor(sorted(wanted), dtype=kinds.dtype, device=kinds.device))
