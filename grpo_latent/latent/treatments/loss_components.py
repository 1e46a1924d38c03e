"""The loss at latents as a list of components, which the trainer adds up without knowing them.

A component has a name, a weight and one value for each position.

    component    values                                     over      weight
    pg_loss      clipped ratio of the log-densities         acts      LatentTerms.weight
    kl           estimate of KL(policy || reference)        acts      LatentTerms.kl_coef
    anchor       distance of predictions to the reference's latents   LatentTerms.anchor_weight
    ratio_mean, clipfrac, clipfrac_lower, log_density       acts      None: reported only

These are what every treatment has by default; its `components` may leave some out, replace them or
add its own.

Legend: A live positions that act and are no text, M live LATENT positions, S statistics a latent,
H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from grpo_latent.algo.anchor import anchor_distances
from grpo_latent.algo.losses import clipped_losses, kl_penalty
from grpo_latent.errors import LatentMismatchError
from grpo_latent.latent.treatments.terms import LatentTerms


@dataclass(frozen=True)
class Component:
    """One term of the loss; logged as `latent/<name>`, without the weight.

    Attributes:
        weight: the loss gets weight · reduction(values), reduced as the text's loss is
            (`loss_agg_mode`), the counts being those of the whole mini-batch over all ranks. 0
            only reports that; None reports the plain mean over positions.
        values: float, one for each position of `over`, row-major, with gradient if it has a
            weight.
        over: `acts`, positions that act and are no text, or `latents`, LATENT ones; of
            trajectories that were not dropped.
        is_shared: whether it belongs to the mean that text and latents share with weight
            `by_count`.
    """

    name: str
    weight: float | None
    values: Tensor
    over: Literal["acts", "latents"] = "latents"
    is_shared: bool = True


@dataclass(frozen=True)
class Acts:
    """Live positions that act and are no text: latents with a density, drawn image positions.

    Attributes:
        log_probs_A, old_log_probs_A: float32, nats; gradient flows to the first.
        ref_log_probs_A: of the reference; None without one.
        advantages_A: of their trajectories.
    """

    log_probs_A: Tensor
    old_log_probs_A: Tensor
    ref_log_probs_A: Tensor | None
    advantages_A: Tensor


@dataclass(frozen=True)
class LatentView:
    """What a component may be made of: one micro-batch, without dropped trajectories.

    Attributes:
        acts: None where only text acts.
        statistics_MS: `Treatment.statistics` of the current model, with gradient; None where
            nothing asked for it.
        ref_statistics_MS: of the reference; None without one.
    """

    acts: Acts | None = None
    statistics_MS: Tensor | None = None
    ref_statistics_MS: Tensor | None = None

    def with_reference(self, what: str) -> tuple[Tensor, Tensor]:
        """Statistics of the current model and of the reference, both [M, S].

        Raises:
            LatentMismatchError: there is none, for `what`.
        """
        if self.statistics_MS is None or self.ref_statistics_MS is None:
            raise LatentMismatchError(
                f"no reference for {what}",
                where="actor update",
                got="no ref_latent_means in the batch",
                expected="the reference's predictions",
                fix="Set actor_rollout_ref.actor.use_kl_loss=true "
                "(kl_loss_coef=0 leaves the text's KL out).",
            )
        return self.statistics_MS, self.ref_statistics_MS.detach()


def clipped_ratio(acts: Acts, terms: LatentTerms) -> list[Component]:
    """The clipped ratio of the log-densities, with latents' own bounds, and what it logs."""
    clipped = clipped_losses(
        acts.log_probs_A,
        acts.old_log_probs_A,
        acts.advantages_A,
        clip_low=terms.clip_low,
        clip_high=terms.clip_high,
        clip_ratio_c=terms.clip_ratio_c,
        log_ratio_bound=terms.log_ratio_bound,
    )
    logged = {
        "ratio_mean": clipped.log_ratios.exp(),
        "clipfrac": clipped.was_clipped,
        "clipfrac_lower": clipped.was_bounded,
        "log_density": acts.log_probs_A,
    }
    return [
        Component("pg_loss", terms.policy_weight, clipped.losses, "acts"),
        *(
            Component(name, None, values.detach().float(), "acts")
            for name, values in logged.items()
        ),
    ]


def density_kl(acts: Acts, terms: LatentTerms) -> list[Component]:
    """`kl_kind`'s estimate from the recorded actions; nothing without a reference."""
    if acts.ref_log_probs_A is None:
        return []
    # rows are packed: what does not act was left out before
    everywhere_A = torch.ones_like(acts.log_probs_A, dtype=torch.bool)
    kl_A = kl_penalty(
        acts.log_probs_A, acts.ref_log_probs_A, everywhere_A, terms.kl_kind, terms.log_ratio_bound
    )
    return [Component("kl", terms.kl_coef, kl_A, "acts")]


def anchor(
    view: LatentView, terms: LatentTerms, hidden_size: int | None = None
) -> list[Component]:
    """How far predictions are from the reference's; nothing at weight 0.

    Args:
        hidden_size: H, where the statistics have more columns than the mean, which is the first H
            of them.
    """
    if not terms.anchor_weight:
        return []
    statistics_MS, ref_MS = view.with_reference("the latent anchor")
    distances_M = anchor_distances(statistics_MS[:, :hidden_size], ref_MS[:, :hidden_size])
    return [Component("anchor", terms.anchor_weight, distances_M, is_shared=False)]
