"""One model as the latent machinery uses it: positions, hidden states, logits, checks of prompts.

What is a matter of the model's family (its tower, placeholders, positions of images, merge) is
asked of its `Backbone`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from grpo_latent.backbones.images import ImageInputs
from grpo_latent.backbones.registry import backbone_of
from grpo_latent.errors import ConfigError, RolloutError
from grpo_latent.latent.mechanisms import HiddenSource, Mechanism
from grpo_latent.models.positions import plain_positions, with_components
from grpo_latent.trajectory import prompt_kinds


class ModelAdapter:
    """Positions, masks, hidden states, logits and latents of one model.

    Args:
        mechanism: what latents are for this model; None where none are made, and positions are the
            model's own.

    Raises:
        ConfigError: a family that no backbone serves, or a model that latents cannot enter (see
            `Backbone`).
    """

    def __init__(self, model: PreTrainedModel, mechanism: Mechanism | None = None):
        self.model = model
        self._mechanism = mechanism
        self.positions = Mechanism.positions if mechanism is None else mechanism.positions
        self.backbone = backbone_of(model)
        self.base = self.backbone.base
        self.decoder = self.backbone.decoder
        self.text_config = self.backbone.text_config
        self.has_vision = self.backbone.has_vision
        self.has_mrope = self.backbone.has_mrope
        self.image_token_id = self.backbone.image_token_id
        self.vision_ids = self.backbone.vision_ids

    @property
    def mechanism(self) -> Mechanism:
        """What latents are for this model.

        Raises:
            ConfigError: the adapter was made without one; h would pass for a latent, unnoticed.
        """
        if self._mechanism is None:
            raise ConfigError(
                "no mechanism says what a latent is",
                where="ModelAdapter",
                got=f"an adapter of {type(self.model).__name__} alone",
                expected="ModelAdapter(model, mechanism)",
            )
        return self._mechanism

    @property
    def has_mechanism(self) -> bool:
        """Whether the adapter was made with one; recorded vectors can be fed without."""
        return self._mechanism is not None

    @property
    def hidden_size(self) -> int:
        """H, of hidden states and of latents."""
        return self.text_config.hidden_size

    @property
    def dtype(self) -> torch.dtype:
        """That of the token embeddings."""
        return self.backbone.embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the token embeddings are."""
        return self.backbone.embedding.weight.device

    def check_prompt(self, prompt_ids: Tensor, images: ImageInputs | None, where: str) -> None:
        """Raises `RolloutError` unless ids [P] are known and placeholders fit the pixels.

        Hugging Face compares the totals of a batch only, and reads placeholders without any image
        as words.
        """
        vocab_size = self.backbone.embedding.num_embeddings
        if int(prompt_ids.min()) < 0 or int(prompt_ids.max()) >= vocab_size:
            got = f"ids in {int(prompt_ids.min())}..{int(prompt_ids.max())}"
            raise RolloutError(
                "ids outside the vocabulary", where=where, got=got, expected=f"0..{vocab_size - 1}"
            )
        if images is None and not self.has_vision:
            return
        if not self.has_vision:
            model = type(self.model).__name__
            raise RolloutError(
                "images for a text-only model", where=where, got=model, expected="no images"
            )
        num_placeholders = int(self.backbone.is_image_token(prompt_ids).sum())
        num_tokens = 0 if images is None else int(self.num_image_tokens(images).sum())
        if images is not None:
            num_rows = self.backbone.num_pixel_rows(images)
            if num_rows != images.pixel_values.shape[0]:
                raise RolloutError(
                    "pixels do not fit the image grid",
                    where=where,
                    got=f"{images.pixel_values.shape[0]} patches, "
                    f"image_grid_thw {images.image_grid_thw.tolist()}",
                    expected=f"{num_rows} patches",
                )
        if num_placeholders != num_tokens:
            raise RolloutError(
                "image placeholders do not fit the images",
                where=where,
                got=f"{num_placeholders} placeholders",
                expected=f"{num_tokens}, one for each merged visual token",
                fix="Expand placeholders with the model's own processor.",
            )

    def check_room(self, num_positions: int, where: str) -> None:
        """Raises `RolloutError` where a sequence has more positions than the model knows.

        An embedding of positions would raise an index, or on CUDA end the process.
        """
        bound = self.backbone.num_positions
        if bound is not None and num_positions > bound:
            raise RolloutError(
                "more positions than the model has",
                where=where,
                got=num_positions,
                expected=f"<= {bound}, the position embeddings of {type(self.model).__name__}",
                fix="Shorten the prompt, or lower the length of responses.",
            )

    def num_image_tokens(self, images: ImageInputs) -> Tensor:
        """int64 [images], placeholders of each."""
        return self.backbone.num_image_tokens(images)

    def prompt_kinds(self, input_ids: Tensor) -> Tensor:
        """int64, same shape: VISION at placeholders and delimiters of images, PROMPT elsewhere."""
        return prompt_kinds(input_ids, self.vision_ids)

    def position_ids(
        self, input_ids_BT: Tensor, valid_BT: Tensor, images: ImageInputs | None
    ) -> Tensor:
        """Position ids, int64: [3, B, T] (mRoPE) or [B, T].

        What stands after the prompt's images counts on as text; with positions `1d`, so do these.
        Computed here and always passed on: left to itself, a Hugging Face VL model keeps
        `rope_deltas` as hidden state.
        """
        plain = with_components(plain_positions(valid_BT), self.has_mrope)
        if images is None or self.positions == "1d":
            return plain
        return self.backbone.position_ids(input_ids_BT, valid_BT, images, plain)

    def forward_hidden(
        self,
        input_ids_BT: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        images: ImageInputs | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Hidden states [B, T, H] after the final norm, of a forward that starts from token ids.

        Args:
            attention_mask: additive bias [B, 1, T, T_total], or bool/int validity [B, T].

        Raises:
            RolloutError: images for a text-only model, or positions that it does not know.
        """
        if self.backbone.num_positions is not None:
            self.check_room(int(position_ids.max()) + 1, type(self.model).__name__)
        inputs: dict[str, Tensor] = {}
        if images is not None:
            if not self.has_vision:  # a text model would ignore the pixels without a word
                model = type(self.model).__name__
                raise RolloutError(
                    "images for a text-only model", where=model, got="images", expected="no images"
                )
            input_ids_BT, inputs = self.backbone.forward_inputs(input_ids_BT, images)
        return self.base(
            input_ids=input_ids_BT,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=cache is not None,
            **inputs,
        ).last_hidden_state

    def encode_images(self, images: ImageInputs) -> Tensor:
        """Image embeddings [M, H] of all images in order: what stands at image placeholders."""
        return self.backbone.encode_images(images)

    def decode_hidden(
        self, embeds_NH: Tensor, bias_N11S: Tensor, position_ids: Tensor, cache: Cache
    ) -> Tensor:
        """One decoding step from input vectors: last hidden states [N, H]."""
        return self.decoder(
            inputs_embeds=embeds_NH[:, None],
            attention_mask=bias_N11S,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, 0]

    def make(self, hidden_MH: Tensor) -> Tensor:
        """The vectors that the mechanism records of hidden states [..., H], in their shape."""
        source = HiddenSource(hidden_MH, lambda: self.logits(hidden_MH), self.embed)
        return self.mechanism.make(self.model, source)

    def embed(self, token_ids: Tensor) -> Tensor:
        """Token embeddings [..., H] of ids [...], as the model's own forward reads them."""
        return self.backbone.embedding(token_ids)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., H], as the model's own forward makes them."""
        return self.backbone.mask_unpredicted(self.model.get_output_embeddings()(hidden))
