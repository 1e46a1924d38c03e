"""What the latent machinery needs to know of a Hugging Face model, in one place.

Serves causal language models (Qwen2, Qwen3, Llama, …) and image-text-to-text models whose forward takes `input_ids`,
`pixel_values`, `image_grid_thw` and a cache (Qwen2-VL, Qwen2.5-VL, Qwen3-VL).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from grpo_latent.errors import ConfigError, RolloutError
from grpo_latent.latent.config import POSITIONS
from grpo_latent.trajectory import prompt_kinds


@dataclass(frozen=True)
class ImageInputs:
    """Pixels of the images of one prompt or batch, as the Qwen image processors lay them out.

    Attributes:
        pixel_values: float [patches, channels * temporal * patch * patch].
        image_grid_thw: int64 [images, 3], patches along time, height and width.
    """

    pixel_values: Tensor
    image_grid_thw: Tensor

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
        self.has_vision = hasattr(self.base, "visual")
        self.has_mrope = hasattr(self.base, "get_rope_index")
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        ids = {name: getattr(model.config, name, None) for name in names} if self.has_vision else {}
        self.image_token_id: int | None = ids.get("image_token_id")
        self.vision_ids = frozenset(token_id for token_id in ids.values() if token_id is not None)

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
        num_patches = 0 if images is None else int(images.image_grid_thw.prod(-1).sum())
        if images is not None and num_patches != images.pixel_values.shape[0]:
            raise RolloutError(
                "pixels do not fit the image grid",
                where=where,
                got=f"{images.pixel_values.shape[0]} patches, image_grid_thw {images.image_grid_thw.tolist()}",
                expected=f"{num_patches} patches",
            )
        num_tokens = num_patches // self.model.config.vision_config.spatial_merge_size**2
        if num_placeholders != num_tokens:
            raise RolloutError(
                "image placeholders do not fit the images",
                where=where,
                got=f"{num_placeholders} placeholders",
                expected=f"{num_tokens}, one for each merged visual token",
                fix="Expand placeholders with the model's own processor.",
            )

    def prompt_kinds(self, input_ids: Tensor) -> Tensor:
        return prompt_kinds(input_ids, self.vision_ids)

    def position_ids(self, input_ids_BT: Tensor, valid_BT: Tensor, images: ImageInputs | None) -> Tensor:
        """Position ids, int64: [3, B, T] (mRoPE) or [B, T]. Positions after the prompt's images count on as text; with
        positions `1d`, so do the images.

        Computed here and always passed on: left to itself, a Hugging Face VL model keeps `rope_deltas` as hidden state, and
        without `mm_token_type_ids` it numbers image positions as text, silently.
        """
        plain_BT = (valid_BT.long().cumsum(-1) - 1).clamp(min=0)
        if not self.has_mrope:
            return plain_BT
        if images is None or self.positions == "1d":
            return plain_BT[None].expand(3, -1, -1)
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
        """Image embeddings after the merger, [M, H], of all images in order: what stands at image placeholders."""
        features = self.base.get_image_features(
            images.pixel_values.to(self.device), images.image_grid_thw.to(self.device)
        )
        return torch.cat(tuple(features.pooler_output))

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
        return self.model.get_output_embeddings()(hidden)
