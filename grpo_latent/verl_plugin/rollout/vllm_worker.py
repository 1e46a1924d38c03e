"""verl's extension of vLLM's worker: how weights get from the training worker into vLLM.

vLLM makes it a base of the latent worker class (`rollout/vllm/worker.py`), whose methods it
therefore finds on `self`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from grpo_latent.verl_plugin.rollout.vllm_compat import (
    BucketedWeightReceiver,
    patch_vllm_moe_model_weight_loader,
    vLLMColocateWorkerExtension,
)


class LatentWorkerExtension(vLLMColocateWorkerExtension):
    """verl's on an accelerator; on CPU weights come by shared memory and are reloaded whole."""

    # of the latent worker class, whose base this becomes
    latent_reload: Callable[[list[tuple[str, Tensor]]], None]

    def monkey_patch_model(
        self, vocab_size: int, banned_token_ids: list[int] | None = None
    ) -> None:
        """Leaves out verl's masks on the logits.

        The latent sampler bans ids itself, and reports log-probs of the full distribution, which
        are what a replay can recompute.
        """
        for model in self._iter_all_models():
            patch_vllm_moe_model_weight_loader(model)

    def update_weights_from_ipc(
        self, peft_config: dict | None = None, base_sync_done: bool = False, use_shm: bool = False
    ) -> None:
        """Takes all weights from the training worker of this rank."""
        if self.device.type != "cpu":
            # verl's annotation leaves out the None that is its own default
            super().update_weights_from_ipc(
                peft_config,  # type: ignore[arg-type]
                base_sync_done,
                use_shm,
            )
            return
        # vLLM's CPU linears are packed after loading and keep no parameter to load into: only a
        # reload of all works
        weights: list[tuple[str, Tensor]] = []

        def keep(bucket: list[tuple[str, Tensor]], is_last: bool) -> None:
            weights.extend(
                (name, tensor.clone()) for name, tensor in bucket
            )  # the buffer is used again

        receiver = BucketedWeightReceiver(self._get_zmq_handle(), torch.device("cpu"), use_shm)
        receiver.receive_weights(on_bucket_received=keep)
        self.latent_reload(weights)
