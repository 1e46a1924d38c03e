"""Engine `hf`: batched latent rollouts on a Hugging Face model, the reference of other engines.

    requests ──prefill, once a prompt──▶ keys and values ──expand, G rows a prompt──▶ rows
    rows ──each in its own mode: plan ▸ sample or make ▸ record ▸ forward ▸ drop──▶ trajectories

An image is encoded once, a prompt prefilled once, beside prompts of about its length; keys and
values are written in place; rows that have stopped are dropped when they are half of the batch; on
CPU linear layers multiply with packed weights, on CUDA a step is one captured graph. A row's
result depends on weights, prompt, seed and sampling; the batch that it shares moves its numbers by
rounding only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grpo_latent.errors import ConfigError, RolloutError
from grpo_latent.latent.mechanisms import Mechanism
from grpo_latent.latent.treatments import Mask, Treatment
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.attention import SDPA_NAMES, chosen_kernels, folded_attention
from grpo_latent.models.loading import copy_weights
from grpo_latent.models.packed_linears import packed_linears
from grpo_latent.rollout.decoding import DecodingBatch
from grpo_latent.rollout.protocol import RolloutRequest, SamplingParams
from grpo_latent.rollout.start import prompt_start, slot_start
from grpo_latent.rollout.steps import StaticSteps, steps_of
from grpo_latent.rollout.token_rules import TokenRules
from grpo_latent.trajectory import Trajectory


class HFRolloutEngine:
    """Batched latent rollouts. Implements `RolloutEngine`.

    Args:
        model: a Hugging Face model that `ModelAdapter` accepts, attention `sdpa` or `eager`.
        mechanism: the checkpoint's.
        eos_ids: tokens that end a completion, outside latent spans.
        banned_ids: tokens never sampled, besides the latent tokens other than `start` and the
            image placeholders (a sampled image placeholder would break the count of image features
            in every later forward).
        max_batch_rows: trajectories decoded together; a group is never split.
        treatment: what RL makes of latents; it decides what is fed and recorded at them. None is
            `mask`.
        selection_temperature: of the image positions that prompt slots draw (Plackett–Luce); None
            takes those of most attention.
        pack_linears: multiply with packed copies of the decoder's linear weights, made for each
            call of `generate` and dropped after it, where `models.packed_linears.packs` them (CPU,
            float32 or bfloat16; elsewhere the layers run as they are). Moves numbers by rounding
            only, and takes the memory of the decoder's weights once more.
        decoding: how steps are run, one of `steps.DECODINGS`. `growing`: keys and values grow, and
            rows are picked by index. `static`: fixed shapes, and the host reads a step late.
            `graphs`: that, each shape captured as a CUDA graph. None: `graphs` on CUDA, else
            `growing`. Engines of one model share its graphs.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        mechanism: Mechanism,
        eos_ids: Iterable[int],
        banned_ids: Iterable[int] = (),
        max_batch_rows: int = 512,
        treatment: Treatment | None = None,
        selection_temperature: float | None = None,
        pack_linears: bool = True,
        decoding: str | None = None,
    ):
        self.adapter = ModelAdapter(model, mechanism)
        self.model = model
        self.mechanism = mechanism
        self.max_batch_rows = max_batch_rows
        self.policy_version = 0
        self.treatment = treatment or Mask()
        self.selection_temperature = selection_temperature
        self.pack_linears = pack_linears
        self.steps = steps_of(self.adapter, decoding)
        self.treatment.check(mechanism)
        self.treatment.check_model(model)
        attention = self.adapter.text_config._attn_implementation
        if attention not in (*SDPA_NAMES, "eager"):
            raise ConfigError(
                "engine hf decodes with an additive attention bias",
                where="attn_implementation",
                got=attention,
                expected="sdpa or eager",
                fix="Load the rollout model with attn_implementation=sdpa.",
            )
        mechanism.check_model(model)
        eos_ids = sorted(set(eos_ids))
        if not eos_ids:
            raise ConfigError(
                "no end-of-sequence token", where="eos_ids", expected="at least one id"
            )
        if max_batch_rows < 1:
            raise ConfigError(
                "not a batch size", where="max_batch_rows", got=max_batch_rows, expected=">= 1"
            )
        # EOS stays drawable whatever else bans it: a row could not end
        banned = (set(banned_ids) | mechanism.banned_ids | self.adapter.vision_ids) - set(eos_ids)
        self._check_ids(eos_ids, banned)
        vocab_size = model.get_output_embeddings().weight.shape[0]
        self._rules = TokenRules.build(mechanism, eos_ids, banned, vocab_size, self.adapter.device)

    def _check_ids(self, eos_ids: list[int], banned: set[int]) -> None:
        special = set(self.mechanism.token_ids.values())
        if special & set(eos_ids):
            expected = f"none of {sorted(special)}"
            raise ConfigError(
                "an end-of-sequence token is a latent token",
                where="eos_ids",
                got=eos_ids,
                expected=expected,
            )
        vocab_size = self.model.get_output_embeddings().weight.shape[0]
        outside = sorted(
            token_id
            for token_id in {*banned, *special, *eos_ids}
            if not 0 <= token_id < vocab_size
        )
        if outside:
            raise ConfigError(
                "ids outside the vocabulary",
                where="latent config, eos_ids or banned_ids",
                got=outside[:5],
                expected=f"ids in 0..{vocab_size - 1}",
                fix="Model and latent_config.json must come from the same checkpoint.",
            )

    def _check_request(self, request: RolloutRequest, sampling: SamplingParams) -> None:
        where = f"request of group {request.group_id!r}"
        self.adapter.check_prompt(request.prompt_ids, request.images, where)
        self.adapter.check_room(len(request.prompt_ids) + sampling.max_new_tokens, where)
        if request.latent_override is not None:
            shape = tuple(request.latent_override.vectors.shape)
            hidden_size = self.adapter.hidden_size
            if len(shape) != 2 or shape[0] < 1 or shape[1] != hidden_size:
                expected = f"[K, {hidden_size}] with K >= 1"
                raise RolloutError(
                    "not a latent_override", where=where, got=f"shape {shape}", expected=expected
                )

    @torch.no_grad()
    def generate(
        self, requests: list[RolloutRequest], sampling: SamplingParams
    ) -> list[list[Trajectory]]:
        """One list of trajectories a request, in the order of its seeds."""
        for request in requests:
            self._check_request(request, sampling)
        was_training = self.model.training
        self.model.eval()
        try:
            with self._packed():
                return [
                    group
                    for chunk in self._chunks(requests)
                    for group in self._generate_chunk(chunk, sampling)
                ]
        finally:
            self.model.train(was_training)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        """Copies every parameter in place.

        Raises:
            CheckpointError: an unknown name, a wrong shape, or a parameter that was not given.
        """
        copy_weights(self.model, weights, "load_weights")
        self.policy_version = policy_version

    def move_to(self, device: str | torch.device) -> None:
        """Moves the weights, such as off an accelerator that training needs meanwhile."""
        # as a plain module: transformers wraps `to` so that its declared arguments are lost
        model: nn.Module = self.model
        if isinstance(self.steps, StaticSteps):
            self.steps.forget()  # graphs read the weights where they are, and hold memory
        model.to(device)

    def _packed(self) -> AbstractContextManager[int | None]:
        """Packs what reads the prompt or decodes, within the block.

        An image tower stays as it is: it has its own batch sizes, and often its own cache.
        """
        if not self.pack_linears:
            return nullcontext()
        own = self.mechanism.own_modules(self.model)
        return packed_linears([self.adapter.decoder, self.model.get_output_embeddings(), *own])

    def _chunks(self, requests: list[RolloutRequest]) -> Iterator[list[RolloutRequest]]:
        """Requests that decode together; a group shares its prompt's prefill, so stays whole."""
        chunk: list[RolloutRequest] = []
        num_rows = 0
        for request in requests:
            if chunk and num_rows + len(request.seeds) > self.max_batch_rows:
                yield chunk
                chunk = []
                num_rows = 0
            chunk.append(request)
            num_rows += len(request.seeds)
        if chunk:
            yield chunk

    def _generate_chunk(
        self, requests: list[RolloutRequest], sampling: SamplingParams
    ) -> list[list[Trajectory]]:
        if self.mechanism.has_slots:
            start = slot_start(self.adapter, requests, sampling, self.selection_temperature)
        else:
            start = prompt_start(self.adapter, requests)
        batch = DecodingBatch(
            self.adapter, self._rules, requests, sampling, self.treatment, start, self.steps
        )
        # the prefill is over: transformers makes masks for implementations that it knows by name
        # only, and encoded images may outlive the rollout, which tensors of inference mode (5 %
        # faster here) must not
        with (
            folded_attention(self.adapter.text_config),
            chosen_kernels(self.adapter.device),
            torch.inference_mode(),
        ):
            for position in range(sampling.max_new_tokens):
                embeds_NH = batch.choose(position)
                if embeds_NH is None:
                    break
                batch.forward(position, embeds_NH)
        return batch.trajectories(requests, self.policy_version)
