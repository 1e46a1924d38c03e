"""What LVR's SFT minimises beside the cross-entropy, as pure functions.

Losses are sums, see `sft.common.losses`.

Legend: N latents, M visual tokens (candidates of a target), B rows, H hidden states, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo_latent.common.settings import check_choice
from grpo_latent.errors import ConfigError

LATENT_LOSSES = ("mse", "mae", "cosine")
LATENT_LOSS_NORMS = ("none", "variance")
ENDS = ("none", "mode_switch", "latent_end")
INPUTS = ("targets", "shuffled")


@dataclass(frozen=True)
class LVRLossConfig:
    """What SFT minimises: CE + latent_weight * latent loss (+ end_weight * BCE).

    Attributes:
        latent_loss: distance between the fed-back vector and its target; 2509.24251 uses `mse`,
            weight 0.1.
        latent_loss_norm: `variance` divides `mse` by the variance of the targets, so that its
            scale does not depend on the vision tower's. For frozen targets only: a tower that
            trains would shrink the quotient by growing.
        end: `mode_switch` adds a BCE on whether a latent is its span's last (for
            latent.exit=end_token); `latent_end` appends a learned vector to each span, as input
            and as target (for latent.exit=latent_end).
        inputs: what stands at latent positions: their own `targets` (teacher forcing), or,
            `shuffled`, those of the batch in random order: a control whose text cannot learn to
            read latents, while latents are trained as ever.
    """

    latent_loss: str = "mse"
    latent_weight: float = 0.1
    latent_loss_norm: str = "none"
    end: str = "none"
    end_weight: float = 1.0
    inputs: str = "targets"

    @property
    def trains_end_vector(self) -> bool:
        return self.end == "latent_end"

    def __post_init__(self):
        choices = {
            "latent_loss": LATENT_LOSSES,
            "latent_loss_norm": LATENT_LOSS_NORMS,
            "end": ENDS,
            "inputs": INPUTS,
        }
        for name, allowed in choices.items():
            check_choice(getattr(self, name), allowed, f"loss.{name}")
        for name in ("latent_weight", "end_weight"):
            if not getattr(self, name) >= 0:  # refuses NaN too
                raise ConfigError(
                    "not a weight", where=f"loss.{name}", got=getattr(self, name), expected=">= 0"
                )
        if self.latent_loss_norm == "variance" and self.latent_loss != "mse":
            raise ConfigError(
                "the variance normalises squared distances only",
                where="loss.latent_loss_norm",
                got=f"variance with {self.latent_loss}",
                expected="latent_loss mse",
                fix="Set loss.latent_loss_norm=none.",
            )


def latent_distances(predicted_NH: Tensor, target_NH: Tensor, kind: str) -> Tensor:
    """Compares two sets of vectors, float32 [N].

    Mean over H of the squared (`mse`) or absolute (`mae`) difference, or 1 - cosine (`cosine`).

    Raises:
        ConfigError: another `kind`.
    """
    check_choice(kind, LATENT_LOSSES, "loss.latent_loss")
    # half precision would lose small differences between large vectors
    predicted_NH, target_NH = predicted_NH.float(), target_NH.float()
    if kind == "mse":
        return (predicted_NH - target_NH).square().mean(-1)
    if kind == "mae":
        return (predicted_NH - target_NH).abs().mean(-1)
    return 1 - F.cosine_similarity(predicted_NH, target_NH, dim=-1)


def end_bce_sum(logits_NV: Tensor, is_last_N: Tensor, end_id: int) -> Tensor:
    """Sums the BCE of "this latent is its span's last" under P(end) = softmax(logits)[end].

    The published mode-switch variant takes the raw end-logit as the log-odds. Its exit asks
    whether `end` is the arg-max, which a raw logit does not decide, since nothing trains the other
    logits at inner latents; log-odds under the softmax do.
    """
    logits_NV = logits_NV.float()
    is_end_V = torch.zeros(logits_NV.shape[-1], dtype=torch.bool, device=logits_NV.device)
    is_end_V[end_id] = True
    log_odds_N = logits_NV[:, end_id] - logits_NV.masked_fill(is_end_V, -torch.inf).logsumexp(-1)
    return F.binary_cross_entropy_with_logits(log_odds_N, is_last_N.float(), reduction="sum")


def target_variance(targets_MH: Tensor) -> float:
    """Averages over the features the (unbiased) variance of each over M target vectors.

    Raises:
        ConfigError: there are fewer than two targets.
    """
    if targets_MH.shape[0] < 2:
        raise ConfigError(
            "too few targets for a variance",
            where="loss.latent_loss_norm",
            got=f"{targets_MH.shape[0]} visual tokens",
            expected="at least 2",
        )
    return targets_MH.double().var(0).mean().item()


@torch.no_grad()
def nearest_target_hits(
    predicted_NH: Tensor,
    roi_N: Tensor,
    row_N: Tensor,
    visual_MH: Tensor,
    num_visual_tokens_B: Tensor,
) -> Tensor:
    """Says whether the visual token of the row that is nearest (Euclidean) is the target.

    Args:
        roi_N: index of the target among the M visual tokens; predictions without one (negative)
            count as misses.
        row_N: batch row of each latent.
        num_visual_tokens_B: visual tokens of each row, in order.

    Returns:
        bool [N].
    """
    stops_B = num_visual_tokens_B.cumsum(0).tolist()
    nearest_N = torch.full_like(roi_N, -1)
    for row in row_N.unique().tolist():  # row by row: another row's image is no candidate
        of_row_N = row_N == row
        start = stops_B[row] - int(num_visual_tokens_B[row])
        tokens = visual_MH[start : stops_B[row]].float()
        nearest_N[of_row_N] = start + torch.cdist(predicted_NH[of_row_N].float(), tokens).argmin(
            -1
        )
    return (nearest_N == roi_N) & (roi_N >= 0)
