"""How much gradient reaches latents and text: norms of d loss / d input vector by position."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

from grpo_latent.trajectory import PositionKind, is_sampled_delimiter, made_mask

LATENT, TEXT = "latent_grad_norm", "text_grad_norm"


class InputGradients:
    """Watches what the embedding module returns in forwards between `watch` and `close`.

    Recorded latents are among it. A token whose input is composed with a recorded vector counts as
    a latent. Chosen image embeddings, which no hidden state makes, are left out.
    """

    def __init__(self, module: PreTrainedModel):
        self._kinds_BT: Tensor | None = None
        self._report: dict | None = None
        module.get_input_embeddings().register_forward_hook(self._on_forward)

    def watch(self, kinds_BT: Tensor) -> None:
        """The next forward is of positions of these kinds."""
        self._kinds_BT = kinds_BT

    def close(self, report: dict | None = None) -> None:
        """Ends watching; the next backward fills `report` with mean norms of latents and text."""
        self._kinds_BT = None
        self._report = report
        if report is not None:
            report.update({LATENT: 0.0, TEXT: 0.0})

    def _on_forward(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        if self._kinds_BT is None or not output.requires_grad:
            return
        if output.shape[:-1] != self._kinds_BT.shape:
            return  # somebody looks up other tokens within the forward, such as a mixture of all
        kinds_BT = self._kinds_BT.to(output.device)
        is_text_BT = (kinds_BT == PositionKind.TEXT) | is_sampled_delimiter(kinds_BT)
        is_latent_BT = made_mask(kinds_BT)
        output.register_hook(lambda gradient: self._take(gradient, is_latent_BT, is_text_BT))

    def _take(self, gradient: Tensor, is_latent_BT: Tensor, is_text_BT: Tensor) -> None:
        if self._report is None:
            return
        norms_BT = gradient.detach().float().norm(dim=-1)
        for name, mask_BT in ((LATENT, is_latent_BT), (TEXT, is_text_BT)):
            self._report[name] = float((norms_BT * mask_BT).sum() / mask_BT.sum().clamp(min=1))
        self._report = None


def rename(metrics: dict) -> None:
    """Moves what the engine reports from verl's `actor/` to `latent/`, with the norms' ratio."""
    latent = metrics.pop(f"actor/{LATENT}", None)
    text = metrics.pop(f"actor/{TEXT}", None)
    if latent is None or text is None:
        return
    metrics |= {"latent/grad_norm_latent": latent, "latent/grad_norm_text": text}
    if text > 0:
        metrics["latent/grad_norm_ratio"] = latent / text
