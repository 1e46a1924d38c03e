"""How weights leave the latent engine and come back: to rollouts, to and from checkpoints."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from grpo_latent.common.pickles import check_pickles, without_code
from grpo_latent.errors import ConfigError
from grpo_latent.latent.mechanisms import Mechanism
from grpo_latent.verl_plugin.boot import compat
from grpo_latent.verl_plugin.boot.options import LatentOptions
from grpo_latent.verl_plugin.worker.adapters import (
    StartValues,
    add_adapters,
    full_tensors,
    merged_tensors,
)
from grpo_latent.verl_plugin.worker.finite import check_weights
from grpo_latent.verl_plugin.worker.finite_engine import FiniteEngine
from grpo_latent.verl_plugin.worker.hf_folder import complete_hf_folder
from grpo_latent.verl_plugin.worker.parts import (
    HF_FOLDER,
    PartDigests,
    part_name,
    ranks_to_read,
    saved_world_size,
)
from grpo_latent.verl_plugin.worker.reshard import load_resharded


class WeightsEngine(FiniteEngine):
    """Sends, saves and loads weights in full precision, those of adapters merged or exactly.

    Attributes:
        parts: digests of this rank's files of the last save.
    """

    options = LatentOptions()
    mechanism: Mechanism
    parts: PartDigests | None = None
    _start: StartValues | None = None

    # ---- adapters

    def _build_lora_module(self, module):
        return add_adapters(module, self.model_config, self.mechanism, self.options)

    def initialize(self):
        super().initialize()
        if self._is_lora:
            self._start = StartValues(self.module)

    @contextmanager
    def disable_adapter(self):
        """The reference of a run with adapters: this model as the run began."""
        assert self._start is not None, "verl asks where there are adapters"
        with self.module.disable_adapter(), self._start.in_place():
            yield

    # ---- to rollouts

    def get_per_tensor_param(self, layered_summon=False, base_sync_done=False, **kwargs):
        """All weights in full precision under the plain module's own names, our own ones too.

        verl's own version renames to checkpoint names and sends merged LoRA weights as bf16, which
        would put the rollout's policy beside the trained one. A collective: every rank must
        iterate the generator to its end.
        """
        check_weights(self.module, f"after {self.step}, before weights are sent")
        if not self._is_lora:
            return full_tensors(self.module.state_dict()), None
        if not self.model_config.lora.get("merge", False):
            raise ConfigError(
                "rollout engines take merged weights only",
                where="actor_rollout_ref.model.lora.merge",
                got=False,
                expected="True with LoRA",
            )
        return merged_tensors(self.module), None

    # ---- checkpoints

    def save_checkpoint(
        self, local_path, hdfs_path=None, global_step=0, max_ckpt_to_keep=None, **kwargs
    ):
        exported = compat.exporting(self._gather_merged) if self._is_lora else nullcontext()
        with exported:
            super().save_checkpoint(local_path, hdfs_path, global_step, max_ckpt_to_keep, **kwargs)
        if self.rank == 0:
            complete_hf_folder(f"{local_path}/{HF_FOLDER}", self.model_config, self.mechanism)
        self.parts = PartDigests(local_path, self.rank)
        torch.distributed.barrier()

    def _gather_merged(self) -> dict[str, torch.Tensor]:
        """The plain model's weights on rank 0; the others gather with it."""
        kept = {}
        for name, tensor in merged_tensors(self.module):
            if self.rank == 0:
                kept[name] = tensor.cpu()
        return kept

    def load_checkpoint(self, local_path, *args, **kwargs):
        """verl's, which would run whatever code the files hold: here tensors and values only.

        What another number of ranks has saved is sharded anew; verl would not find its files.
        """
        manager, folder = self.checkpoint_manager, Path(local_path)
        loads = {
            "model": manager.should_load_model,
            "optim": manager.should_load_optimizer,
            "extra_state": manager.should_load_extra,
        }
        num_saved = saved_world_size(folder)
        ranks = ranks_to_read(num_saved, manager.world_size, manager.rank)
        stems = [stem for stem, is_loaded in loads.items() if is_loaded]
        paths = [folder / part_name(stem, num_saved, rank) for stem in stems for rank in ranks]
        is_trusted = self.options.trust_pickles
        check_pickles(paths, is_trusted, "latent.trust_pickles")
        with without_code(is_trusted):
            if num_saved == manager.world_size:
                super().load_checkpoint(local_path, *args, **kwargs)
                return
            load_resharded(manager, folder, num_saved)
        if self.is_optimizer_offload_enabled:
            self.to("cpu", model=False, optimizer=True, grad=False)
        torch.distributed.barrier()
