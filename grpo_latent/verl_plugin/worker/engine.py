"""verl's FSDP2 engine with latents, which enter by the embedding hook, padded or packed.

    MicroBatch (ragged rows)                  model forward of verl
      ids      [B, (L)]  ─┐
      kinds    [B, (L)]   ├─ prepare_model_inputs ─▶ ids, mask or bias, injector armed ─▶ log-probs
      latents  [B, (n), H]┘

Kinds and vectors are what the rollout recorded; nothing here derives a latent from a token id.
Chosen image embeddings are replayed by index: their vectors are the forward's own. The placeholder
ids at latent positions are even overwritten, so that an image placeholder or EOS among them has no
effect.
"""

from __future__ import annotations

import warnings
from dataclasses import fields

import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id
from verl.workers.engine import EngineRegistry

from grpo_latent import recorded_fields
from grpo_latent.backbones.images import ImageInputs
from grpo_latent.backbones.registry import backbone_of, find_backbone
from grpo_latent.common.manifest import check_whole
from grpo_latent.errors import ConfigError
from grpo_latent.latent.mechanisms import Mechanism
from grpo_latent.models.groups import first_of_rows
from grpo_latent.models.injection import LatentInjector
from grpo_latent.models.loading import load_latent_parameters
from grpo_latent.models.sequences import LatentSequences
from grpo_latent.models.shared_prompt import SharedPrompt
from grpo_latent.models.treatment_parameters import attach_treatment, initialisation_notes
from grpo_latent.models.vision_cache import VisionCache
from grpo_latent.trajectory import PositionKind, latent_mask
from grpo_latent.verl_plugin.boot import compat
from grpo_latent.verl_plugin.boot.layout import (
    can_share_prompt,
    check_layout,
    check_model,
    check_padding,
)
from grpo_latent.verl_plugin.boot.options import LatentOptions
from grpo_latent.verl_plugin.boot.registration import NAME
from grpo_latent.verl_plugin.worker.choice_forward import ChoiceForward
from grpo_latent.verl_plugin.worker.finite import SkippedUpdates, check_rows
from grpo_latent.verl_plugin.worker.gradients import InputGradients
from grpo_latent.verl_plugin.worker.group_images import GroupImages
from grpo_latent.verl_plugin.worker.latent_loss import NUM_ACTS, NUM_LATENTS, LatentLoss
from grpo_latent.verl_plugin.worker.micro_batch import MicroBatch, engine_sequences
from grpo_latent.verl_plugin.worker.scored_head import ScoredHead, Wanted
from grpo_latent.verl_plugin.worker.treated_forward import TreatedForward
from grpo_latent.verl_plugin.worker.weights_engine import WeightsEngine


@EngineRegistry.register(
    model_type="language_model", backend=["fsdp2"], device=["cpu", "cuda"], vendor=NAME
)
class LatentFSDPEngine(WeightsEngine):
    """Replays recorded latents; otherwise verl's engine."""

    freeze_vision = False
    # of the forward that runs, None between two
    batch: MicroBatch | None = None
    sequences: LatentSequences | None = None

    def configure(
        self,
        options: LatentOptions,
        freeze_vision: bool = False,
        group_images: GroupImages | None = None,
    ) -> None:
        """To be called before `initialize`; without `group_images`, batches bring their images."""
        self.group_images = group_images
        self.options = options
        self.freeze_vision = freeze_vision
        self.skipped = SkippedUpdates(options.max_skipped_updates)

    # ---- building -------------------------------------------------------------------------------

    def _build_module(self):
        folder = self.model_config.local_path
        assert folder is not None, "verl's model config fetches it when it is made"
        if self.rank == 0:  # whose weights the others are sent
            check_whole(folder, self.options.verify_digests)
        self.mechanism: Mechanism = self.options.mechanism(folder, self.model_config.tokenizer)
        # before verl reads the weights: a refusal need not wait for that
        check_model(self.model_config.hf_config)
        check_layout(
            self.model_config, self.mechanism.visibility, self.options.draw_temperature is not None
        )
        check_packed(self.model_config)
        module = super()._build_module()
        # all that has parameters joins before FSDP wraps the module: so it is sharded, trained,
        # saved and sent to rollouts as the model's own
        self.mechanism.attach(module)
        if (
            not module.get_input_embeddings().weight.is_meta
        ):  # the other ranks receive rank 0's weights from FSDP2
            load_latent_parameters(module, self.mechanism, folder)
        attach_treatment(module, self.options.treatment, folder, self.options.seed)
        if self.rank == 0:  # the driver cannot look into a remote folder
            for note in initialisation_notes(self.options.treatment, folder, self.options.seed):
                warnings.warn(note, stacklevel=2)
        self.backbone = backbone_of(module)
        if self.freeze_vision:
            for vision_module in self.backbone.vision_modules:
                vision_module.requires_grad_(False)
        # within a forward only: features kept across forwards would make ranks call the tower's
        # collectives unequally often
        caches = self.backbone.caches_tower and self.options.share_images
        self.vision_cache = VisionCache.install(module) if caches else None
        # a hook, since verl's patched forward of vision models overwrites `inputs_embeds`
        self.injector = LatentInjector.install(module, self.mechanism)
        if self._is_lora:  # frozen embeddings would hide the gradient at what the model is fed
            module.enable_input_require_grads()
        self.input_gradients = InputGradients(
            module
        )  # after the injector: it watches what the model is fed
        self.head = ScoredHead.install(module) if self.options.score_in_head else None
        shares = self.options.share_prompt and can_share_prompt(
            self.model_config.use_remove_padding, self.backbone.text_config._attn_implementation
        )
        self.shared_prompt = SharedPrompt.install(module) if shares else None
        self.options.treatment.check(self.mechanism)
        self.treated = TreatedForward(
            self, module, self.injector, self.options.treatment, self.options.terms
        )
        self.choices = ChoiceForward(
            module, self.mechanism.top_k_image, self.options.draw_temperature
        )
        return module

    def _build_fsdp_module(self, module):
        with compat.without_pinned_offload(self.engine_config):
            return super()._build_fsdp_module(module)

    # ---- forward --------------------------------------------------------------------------------

    def forward_backward_batch(self, data: TensorDict, loss_function, forward_only=False):
        if self.group_images is not None and self.backbone.has_vision:
            self.group_images.add_to(data)
        if isinstance(loss_function, LatentLoss) and not forward_only:
            # before verl cuts the mini-batch: every micro-batch divides by the counts of all of
            # them
            counts = loss_function.count(data).to(get_device_id())
            torch.distributed.all_reduce(counts, group=self.get_data_parallel_group())
            tu.assign_non_tensor(
                data, **dict(zip((NUM_ACTS, NUM_LATENTS), counts.tolist(), strict=True))
            )
        return super().forward_backward_batch(data, loss_function, forward_only)

    def forward_step(self, micro_batch: TensorDict, loss_function, forward_only):
        self.trains = not forward_only
        try:
            result = super().forward_step(micro_batch, loss_function, forward_only)
            self.injector.check_used()
            self.input_gradients.close(None if forward_only else result[1]["metrics"])
            return result
        finally:
            self.injector.disarm()
            self.treated.disarm()
            self.choices.disarm()
            if self.shared_prompt is not None:
                self.shared_prompt.disarm()
            if self.head is not None:
                self.head.disarm()
            self.batch = self.sequences = None

    def prepare_model_inputs(self, micro_batch: TensorDict):
        batch = self.batch = MicroBatch.of(micro_batch)
        latents = micro_batch[recorded_fields.field("latents").column].unbind()
        check_rows(micro_batch, "recorded latents", latents)
        placeholder_id = self.mechanism.placeholder_id(PositionKind.LATENT)
        batch.cover_latents(placeholder_id)
        groups = self._shared_groups(batch)
        if groups is not None:
            batch.keep_images_once(groups, placeholder_id)
        if self.backbone.has_mrope:
            batch.expand_positions()
        model_inputs, output_args = super().prepare_model_inputs(micro_batch)
        self._keep_image_arguments(model_inputs)
        check_padding(self.mechanism.visibility, batch.is_packed)
        sequences = engine_sequences(model_inputs, batch, self.mechanism.visibility, groups)
        if self.shared_prompt is not None and groups is not None:
            self.shared_prompt.arm(sequences)  # its attention knows the rule
        elif (
            sequences.visibility != "full"
        ):  # otherwise verl's own mask stays, and with it its fastest kernel
            model_inputs["attention_mask"] = sequences.attention_bias(self._autocast_dtype)
        # for all forwards: passes that recompute latents read chosen image embeddings, too
        self.choices.feed(batch, None if groups is None else first_of_rows(groups))
        sequences = self.treated.prepare(model_inputs, sequences, batch, self.trains)
        # after those passes: the attention that scores a choice is that of verl's forward alone
        self.choices.prepare(sequences, batch)
        # last, since each pass has armed it with what it fed
        self.injector.arm(sequences.recorded_mask_BT, sequences.latents_NH)
        self.input_gradients.watch(
            sequences.kinds_BT
        )  # of verl's forward, not of those that recomputed the latents
        self.sequences = sequences
        if self._scores_in_head(micro_batch):
            self._arm_head(micro_batch, output_args, sequences)
        return model_inputs, output_args

    def _shared_groups(self, batch: MicroBatch) -> tuple[int, ...] | None:
        """The rows' groups where some share their prompt, else None."""
        if self.shared_prompt is None or batch.groups is None:
            return None
        return batch.groups if len(set(batch.groups)) < len(batch.groups) else None

    def _scores_in_head(self, micro_batch: TensorDict) -> bool:
        """False where verl is asked for what needs the logits of all positions."""
        flags = ("use_fused_kernels", "calculate_sum_pi_squared", "distillation_use_topk")
        return self.head is not None and not any(
            tu.get_non_tensor_data(data=micro_batch, key=flag, default=False) for flag in flags
        )

    def _arm_head(
        self, micro_batch: TensorDict, output_args: dict, sequences: LatentSequences
    ) -> None:
        """Has the tokens of completions scored; a latent position has none."""
        assert self.head is not None
        kinds_BT = sequences.kinds_BT
        is_token_BT = (kinds_BT >= PositionKind.TEXT) & ~latent_mask(kinds_BT)
        is_token_BT[:, 0] = False  # of a packed row's first: the roll would bring it to the last
        if sequences.is_packed:
            temperatures_BT = output_args["temperature_rmpad"][None]
        else:
            temperatures_BT = output_args["temperature"][:, None]
        self.head.arm(
            Wanted(
                is_scored_BT=is_token_BT.roll(-1, dims=1),
                targets_BT=sequences.input_ids_BT.roll(-1, dims=1),
                temperatures_BT=temperatures_BT,
                has_entropy=tu.get_non_tensor_data(
                    data=micro_batch, key="calculate_entropy", default=False
                ),
            )
        )

    def _model_output(self, output, output_args: dict, micro_batch: TensorDict) -> dict:
        """What verl makes of logits, of the head's scores."""
        assert self.head is not None
        scores_BT2 = self.head.take(output.logits)
        offsets = micro_batch["input_ids"].offsets()
        if "pad_size" in output_args:
            scores_L2 = self._gather_and_unpad_packed(scores_BT2[0], output_args["pad_size"])
        else:
            columns_T = torch.arange(scores_BT2.shape[1], device=scores_BT2.device)
            scores_L2 = scores_BT2[columns_T < offsets.diff()[:, None]]
        names = ["log_probs"]
        if tu.get_non_tensor_data(data=micro_batch, key="calculate_entropy", default=False):
            names.append("entropy")
        return {
            name: torch.nested.nested_tensor_from_jagged(values_L, offsets)
            for name, values_L in zip(names, scores_L2.unbind(-1), strict=False)
        }

    def _keep_image_arguments(self, model_inputs: dict) -> None:
        """Drops what is of the rollout's images, but no argument of this family's forward.

        Raises:
            ConfigError: a micro-batch without images, where some ranks would then wait for others'
                vision shards.
        """
        for name in {field.name for field in fields(ImageInputs)} - set(
            self.backbone.image_arguments
        ):
            model_inputs.pop(name, None)
        needs_images = self.backbone.has_vision and not self.backbone.runs_tower_without_images
        if (
            needs_images
            and "pixel_values" not in model_inputs
            and torch.distributed.get_world_size() > 1
        ):
            raise ConfigError(
                "a micro-batch without images",
                where=f"latent engine, {type(self.backbone).__name__} on several ranks",
                got="rows of text only",
                expected="an image in every row",
                fix="Take rows without images out of data.train_files, or train on one rank.",
            )

    def prepare_model_outputs(
        self, output, output_args, micro_batch: TensorDict, logits_processor_func
    ):
        if self._scores_in_head(micro_batch):
            model_output = self._model_output(output, output_args, micro_batch)
        else:
            model_output = super().prepare_model_outputs(
                output, output_args, micro_batch, logits_processor_func
            )
        assert self.batch is not None and self.sequences is not None, "kept with the inputs"
        self.treated.extend(model_output, output_args, self.batch, self.sequences, self.trains)
        self.choices.extend(model_output, self.batch)
        return model_output


def check_packed(model_config) -> None:
    """Raises `ConfigError` at a packed layout without its kernel, which only a worker can tell."""
    if not model_config.use_remove_padding or not find_backbone(model_config.hf_config).has_vision:
        return
    from transformers.utils import is_flash_attn_2_available

    if not is_flash_attn_2_available():
        raise ConfigError(
            "the packed layout of a vision model needs flash-attn",
            where="actor_rollout_ref.model.use_remove_padding",
            got=True,
            expected="False, or flash-attn installed",
        )
