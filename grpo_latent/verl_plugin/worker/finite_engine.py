"""verl's FSDP2 engine whose updates are made with finite numbers, or not at all."""

from __future__ import annotations

import math

from tensordict import TensorDict
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from grpo_latent.errors import ConfigError
from grpo_latent.verl_plugin.worker.finite import (
    SkippedUpdates,
    check_gradients,
    check_loss,
    check_weights,
    step_of,
)


class FiniteEngine(FSDPEngineWithLMHead):
    """Asks loss and gradient before each step, and weights before each save.

    Attributes:
        step: that trains, for messages.
        skipped: counts the updates that verl skips.
    """

    step = "an update"
    skipped: SkippedUpdates

    def train_batch(self, data: TensorDict, loss_function):
        self.step = step_of(data)
        outputs = super().train_batch(data, loss_function)
        if "grad_norm" in outputs["metrics"]:  # on ranks that report
            outputs["metrics"]["skipped_updates"] = [float(self.skipped.in_a_row > 0)]
        return outputs

    def forward_step(self, micro_batch: TensorDict, loss_function, forward_only):
        result = super().forward_step(micro_batch, loss_function, forward_only)
        if not forward_only:
            check_loss(micro_batch, {"loss": result[1]["loss"]})
        return result

    def optimizer_step(self):
        """verl's, which skips an update whose norm is not finite; here that is counted.

        Raises:
            TrainingError: a gradient is not finite, or updates were skipped in a row.
            ConfigError: a bound of the norm that would make it so.
        """
        clip = self.optimizer_config.clip_grad
        if not (clip is not None and 0 < clip < math.inf):
            key = "actor_rollout_ref.actor.optim.clip_grad"
            raise ConfigError("not a bound", where=key, got=clip, expected="finite, > 0")
        # a loss scale makes infinities on its way to the right size, which verl's scaler skips
        if getattr(self, "scaler", None) is None:
            check_gradients(self.module, self.step)
        grad_norm = super().optimizer_step()
        self.skipped.after(float(grad_norm), self.step)
        return grad_norm

    def save_checkpoint(
        self, local_path, hdfs_path=None, global_step=0, max_ckpt_to_keep=None, **kwargs
    ):
        check_weights(self.module, f"step {global_step}, before {local_path} is written")
        super().save_checkpoint(local_path, hdfs_path, global_step, max_ckpt_to_keep, **kwargs)
