"""What the latent machinery needs to know of a Hugging Face model, in one place.

Serves causal language models (Qwen2, Qwen3, Llama, …), image-text-to-text models whose forward takes `input_ids`,
`pixel_values`, `image_grid_thw` and a cache (Qwen2-VL, Qwen2.5-VL, Qwen3-VL), and Chameleon, whose images are discrete: its
VQ model turns one into token ids, and an image embedding is the embedding of such an id. Here those ids take the place of
the placeholders before the forward, which then is that of a text model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from grpo_latent.errors import ConfigError, RolloutError
from grpo_latent.latent.config import POSITIONS
from grpo_latent.models.positions import plain_positions, with_components
from grpo_latent.trajectory import prompt_kinds

CHAMELEON_DELIMITERS = ("<racm3:break>", "<eoss>")  # around the tokens of an image; no field of its config names them


@dataclass(frozen=True)
class ImageInputs:
    """Pixels of the images of one prompt or batch, as their image processors lay them out.

    Attributes:
        pixel_values: float [patches, channels * temporal * patch * patch]; Chameleon: [images, channels, height, width].
        image_grid_thw: int64 [images, 3], patches along time, height and width; Chameleon: tokens, one image in time.
    """

    pixel_values: Tensor
    image_grid_thw: Tensor

    @staticmethod
    def of_processor(batch: Mapping[str, Tensor], processor) -> ImageInputs:
        """Of what a processor or its image processor returns."""
        pixel_values = batch["pixel_values"]
        if "image_grid_thw" in batch:
            return ImageInputs(pixel_values, batch["image_grid_thw"])
        side = math.isqrt(processor.image_seq_length)  # the token map of an image is square
        return ImageInputs(pixel_values, torch.tensor([[1, side, side]] * pixel_values.shape[0]))

    @staticmethod
    def concat(parts: list[ImageInputs | None]) -> ImageInputs | None:
        present = [part for part in parts if part is not None]
        if not present:
            return None
        return ImageInputs(
            torch.cat([part.pixel_values for part in present]), torch.cat([part.image_grid_thw for part in present])
        )


class ModelAdapter:
    """Positions, masks, hidden states and logits of one model.

    Args:
        positions: as `LatentConfig.positions`.

    Raises:
        ConfigError: the model has no token-embedding/decoder structure that latents can enter, or attends over a sliding
            window, which the latent attention bias does not express.
    """

    def __init__(self, model: nn.Module, positions: str = "text_style"):
        if positions not in POSITIONS:
            raise ConfigError("unknown value", where="positions", got=positions, expected=f"one of {POSITIONS}")
        self.model, self.positions = model, positions
        self.base = getattr(model, "model", None)
        if self.base is None or model.get_output_embeddings() is None:
            raise ConfigError(
                "not a causal language model or image-text-to-text model",
                where="model",
                got=type(model).__name__,
                expected="a Hugging Face …ForCausalLM or …ForConditionalGeneration",
            )
        self.text_config = model.config.get_text_config()
        layer_types = set(getattr(self.text_config, "layer_types", None) or ["full_attention"])
        if layer_types != {"full_attention"}:
            raise ConfigError(
                "attention types that latents do not support",
                where="model.config.layer_types",
                got=sorted(layer_types),
                expected="full_attention in every layer",
                fix="Set use_sliding_window=False in the model's config.",
            )
        self.decoder = getattr(self.base, "language_model", self.base)
        self.has_tower, self.has_discrete_images = hasattr(self.base, "visual"), hasattr(self.base, "vqmodel")
        self.has_vision = self.has_tower or self.has_discrete_images
        self.has_mrope = hasattr(self.base, "get_rope_index")
        ids: list[int | None] = []
        self.unpredicted_ids: list[int] = []  # tokens that the model's own forward gives no probability
        if self.has_tower:
            names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
            ids = [getattr(model.config, name, None) for name in names]
        elif self.has_discrete_images:
            mapping = self.base.vocabulary_mapping
            ids = [mapping.image_token_id, *(mapping.vocab_map.get(token) for token in CHAMELEON_DELIMITERS)]
            self.unpredicted_ids = mapping.image_tokens
        self.image_token_id = ids[0] if ids else None
        self.vision_ids = frozenset(token_id for token_id in ids if token_id is not None)

    @property
    def hidden_size(self) -> int:
        return self.text_config.hidden_size

    @property
    def dtype(self) -> torch.dtype:
        return self.model.get_input_embeddings().weight.dtype

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    def check_prompt(self, prompt_ids: Tensor, images: ImageInputs | None, where: str) -> None:
        """Raises `RolloutError` unless ids [P] lie in the vocabulary and image placeholders fit the pixels.

        Hugging Face compares the totals of a batch only, and reads placeholders without any image as words.
        """
        vocab_size = self.model.get_input_embeddings().num_embeddings
        if int(prompt_ids.min()) < 0 or int(prompt_ids.max()) >= vocab_size:
            got = f"ids in {int(prompt_ids.min())}..{int(prompt_ids.max())}"
            raise RolloutError("ids outside the vocabulary", where=where, got=got, expected=f"0..{vocab_size - 1}")
        if images is None and not self.has_vision:
            return
        if not self.has_vision:
            model = type(self.model).__name__
            raise RolloutError("images for a text-only model", where=where, got=model, expected="no images")
        num_placeholders = int((prompt_ids == self.image_token_id).sum())
        num_tokens = 0 if images is None else int(self.num_image_tokens(images).sum())
        if images is not None:
            num_rows = images.image_grid_thw.prod(-1).sum() if self.has_tower else images.image_grid_thw.shape[0]
            if num_rows != images.pixel_values.shape[0]:
                raise RolloutError(
                    "pixels do not fit the image grid",
                    where=where,
                    got=f"{images.pixel_values.shape[0]} patches, image_grid_thw {images.image_grid_thw.tolist()}",
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

    def num_image_tokens(self, images: ImageInputs) -> Tensor:
        """int64 [images], placeholders of each."""
        merge_area = self.model.config.vision_config.spatial_merge_size**2 if self.has_tower else 1
        return images.image_grid_thw.prod(-1) // merge_area

    def prompt_kinds(self, input_ids: Tensor) -> Tensor:
        return prompt_kinds(input_ids, self.vision_ids)

    def position_ids(self, input_ids_BT: Tensor, valid_BT: Tensor, images: ImageInputs | None) -> Tensor:
        """Position ids, int64: [3, B, T] (mRoPE) or [B, T]. Positions after the prompt's images count on as text; with
        positions `1d`, so do the images.

        Computed here and always passed on: left to itself, a Hugging Face VL model keeps `rope_deltas` as hidden state, and
        without `mm_token_type_ids` it numbers image positions as text, silently.
        """
        if not self.has_mrope or images is None or self.positions == "1d":
            return with_components(plain_positions(valid_BT), self.has_mrope)
        position_ids, _ = self.base.get_rope_index(
            input_ids_BT,
            mm_token_type_ids=(input_ids_BT == self.image_token_id).int(),
            image_grid_thw=images.image_grid_thw,
            attention_mask=valid_BT.long(),
        )
        return position_ids

    def forward_hidden(
        self,
        input_ids_BT: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        images: ImageInputs | None = None,
        cache=None,
    ) -> Tensor:
        """Last hidden states after the final norm [B, T, H] of a forward that starts from token ids.

        Args:
            attention_mask: additive bias [B, 1, T, T_total], or bool/int validity [B, T].
        """
        inputs = {}
        if images is not None:
            if not self.has_vision:  # a text model would ignore the pixels without a word
                model = type(self.model).__name__
                raise RolloutError("images for a text-only model", where=model, got="images", expected="no images")
            if self.has_discrete_images:
                image_ids_M = self._discrete_ids(images)
                input_ids_BT = input_ids_BT.masked_scatter(input_ids_BT == self.image_token_id, image_ids_M)
            else:
                inputs = {"pixel_values": images.pixel_values, "image_grid_thw": images.image_grid_thw}
        return self.base(
            input_ids=input_ids_BT,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=cache is not None,
            **inputs,
        ).last_hidden_state

    def encode_images(self, images: ImageInputs) -> Tensor:
        """Image embeddings, after any merger, [M, H], of all images in order: what stands at image placeholders."""
        if self.has_discrete_images:
            return self.embed(self._discrete_ids(images))
        features = self.base.get_image_features(
            images.pixel_values.to(self.device), images.image_grid_thw.to(self.device)
        )
        return torch.cat(tuple(features.pooler_output))

    @torch.no_grad()
    def _discrete_ids(self, images: ImageInputs) -> Tensor:
        """int64 [M], token ids of all images in order; a choice among code vectors, which has no gradient."""
        weight = next(self.base.vqmodel.parameters())
        return self.base.get_image_tokens(images.pixel_values.to(weight.device, weight.dtype)).flatten().long()

    def decode_hidden(self, embeds_NH: Tensor, bias_N11S: Tensor, position_ids: Tensor, cache) -> Tensor:
        """One decoding step from input vectors: last hidden states [N, H]."""
        return self.decoder(
            inputs_embeds=embeds_NH[:, None],
            attention_mask=bias_N11S,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, 0]

    def embed(self, token_ids: Tensor) -> Tensor:
        return self.model.get_input_embeddings()(token_ids)

    def logits(self, hidden: Tensor) -> Tensor:
        """As the model's own forward makes them."""
        logits = self.model.get_output_embeddings()(hidden)
        if self.unpredicted_ids:
            is_out_V = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
            is_out_V[self.unpredicted_ids] = True
            logits = logits.masked_fill(is_out_V, torch.finfo(logits.dtype).min)
        return logits
