"""`Backbone`: all that the toolkit knows of one family of Hugging Face models.

A family is one file with one subclass.

    folder ──config.json──▶ find_backbone ──▶ class: auto class, vision or not, engines' refusals
    images ──processor────▶ image_inputs  ──▶ ImageInputs: pixels and grid
    model  ──ModelAdapter─▶ Backbone(model) ──▶ positions, placeholders, merge of images

What a new family writes (a family without images writes nothing, see `text.py`):

    model_types            `model_type` of its config.json
    processor_names        class names of its processors
    has_mrope              whether positions have three components
    image_inputs           what its processor returns → ImageInputs
    vision_modules         modules that turn pixels into image embeddings
    merger_parameters      those of them that map to the decoder's width
    image_token_id, vision_ids
    num_pixel_rows, num_image_tokens, box_view
    encode_images, forward_inputs
    check_vllm, check_verl, vllm_cannot_build where an engine cannot run it

The defaults below are those of a model whose `base` has `get_image_features(pixel_values)` and a
`language_model`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from grpo_latent.backbones.images import ImageInputs
from grpo_latent.errors import ConfigError


class Backbone:
    """One model seen as a member of its family.

    Everything that needs a config or a processor only is a class method.

    Attributes:
        model_types: values of `model_type` in config.json that this class serves.
        processor_names: class names of the processors whose output `image_inputs` reads.
        auto_class: loads and builds the model.
        base_name: attribute of the model that is the model without its head.
        has_vision: whether the model takes images.
        has_mrope: whether position ids have three components, [3, B, T].
        caches_tower: whether the tower's forward is `tower(pixel_values, grid_thw)`, as
            `models.vision_cache` wraps it.
        runs_tower_without_images: whether the forward that verl puts in place runs the tower on
            nothing for rows of text, so that the collectives of its shards are called equally
            often on all ranks.
        image_arguments: fields of `ImageInputs` that the model's own forward takes.
        vllm_cannot_build: (major, minor) of supported releases of vLLM whose own code fails on it.
        config, text_config: of the model, and of its decoder.
        embedding: the token embeddings.
        base: the model without its head.
        decoder: the module that takes `inputs_embeds` only.
        image_token_id: the placeholder of one image embedding; None without images.
        vision_ids: placeholders and delimiters, which are no words; never sampled.
        unpredicted_ids: tokens that the model's own forward gives no probability.

    Raises:
        ConfigError: the model has no token-embedding/decoder structure that latents can enter, or
            attends over a sliding window, which the latent attention bias does not express.
    """

    model_types: ClassVar[tuple[str, ...]] = ()
    processor_names: ClassVar[tuple[str, ...]] = ()
    auto_class: ClassVar[type[_BaseAutoModelClass]] = AutoModelForImageTextToText
    base_name: ClassVar[str] = "model"
    has_vision: ClassVar[bool] = True
    has_mrope: ClassVar[bool] = False
    caches_tower: ClassVar[bool] = False
    runs_tower_without_images: ClassVar[bool] = False
    image_arguments: ClassVar[tuple[str, ...]] = ("pixel_values", "image_grid_thw")
    vllm_cannot_build: ClassVar[tuple[tuple[int, int], ...]] = ()

    def __init__(self, model: PreTrainedModel):
        base = getattr(model, self.base_name, None)
        if base is None or model.get_output_embeddings() is None:
            raise ConfigError(
                "not a causal language model or image-text-to-text model",
                where="model",
                got=type(model).__name__,
                expected="a Hugging Face …ForCausalLM or …ForConditionalGeneration",
            )
        self.model = model
        self.base = base
        self.config: PreTrainedConfig = model.config
        # by its interface: an adapter's wrapper is no `nn.Embedding`, but has its attributes
        self.embedding = cast(nn.Embedding, model.get_input_embeddings())
        self.text_config = self.config.get_text_config()
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
        self.image_token_id: int | None = None
        self.vision_ids: frozenset[int] = frozenset()
        self.unpredicted_ids: list[int] = []

    @property
    def num_positions(self) -> int | None:
        """Positions that the model has embeddings for; None where positions are computed."""
        return None

    def is_image_token(self, input_ids: Tensor) -> Tensor:
        """bool, same shape: placeholders of image embeddings; nowhere without vision."""
        if self.image_token_id is None:
            return torch.zeros_like(input_ids, dtype=torch.bool)
        return input_ids.eq(self.image_token_id)

    # ---- of a config: before there is a model ---------------------------------------------

    @classmethod
    def model_class(cls, hf_config: PreTrainedConfig) -> type[PreTrainedModel]:
        """The class that `auto_class` builds of this config."""
        mapping: Mapping[type, type[PreTrainedModel]] | None = cls.auto_class._model_mapping
        assert mapping is not None, "every auto class but their base has one"
        return mapping[type(hf_config)]

    @classmethod
    def check_vllm(cls, hf_config: PreTrainedConfig, where: str) -> None:
        """Raises `ConfigError` where vLLM cannot run the model, or not as Hugging Face does."""

    @classmethod
    def check_verl(cls, where: str) -> None:
        """Raises `ConfigError` where verl's engine cannot train the model with latents."""

    # ---- of a processor --------------------------------------------------------------------

    @classmethod
    def image_inputs(cls, batch: Mapping[str, Tensor], processor: ProcessorMixin) -> ImageInputs:
        """Of what a processor, or its image processor alone, returns for images."""
        raise NotImplementedError(f"{cls.__name__}.image_inputs")

    @classmethod
    def bound_image_tokens(
        cls, processor: ProcessorMixin, minimum: int | None, maximum: int | None
    ) -> None:
        """Bounds the tokens of an image, in the processor.

        It is saved with the model, so that RL sees the same images as SFT.

        Raises:
            ConfigError: no image size fits the bounds, or the family's images have one size.
        """
        raise ConfigError(
            "images of this family have no adjustable number of tokens",
            where="data.min_image_tokens, data.max_image_tokens",
            got=(minimum, maximum),
            expected=f"neither, for {cls.__name__}",
        )

    # ---- vision ----------------------------------------------------------------------------

    @property
    def vision_modules(self) -> list[nn.Module]:
        """All modules between pixels and image embeddings, mergers included; the tower first.

        Empty without vision.
        """
        return []

    def merger_parameters(self) -> list[nn.Parameter]:
        """Parameters of `vision_modules` that map tower states to the decoder's width.

        They may be frozen apart from the tower's.
        """
        return []

    @property
    def trains_vision(self) -> bool:
        """Whether a gradient reaches the vision modules at all."""
        return self.has_vision

    @property
    def merge_size(self) -> int:
        """Cells of `image_grid_thw` a side of one image token."""
        return 1

    def num_pixel_rows(self, images: ImageInputs) -> int:
        """Rows of `pixel_values` that the grid asks for."""
        return images.image_grid_thw.shape[0]

    def num_image_tokens(self, images: ImageInputs) -> Tensor:
        """int64 [images], placeholders of each."""
        return images.image_grid_thw.prod(-1) // self.merge_size**2

    def box_view(self, grid_thw: list[int]) -> tuple[int, list[int]]:
        """Where a box is looked up: (first token, grid) of a view that shows the whole image.

        The index counts among the image's own tokens.
        """
        return 0, grid_thw

    def encode_images(self, images: ImageInputs) -> Tensor:
        """Image embeddings [M, H] of all images in order, after any merger.

        They are what stands at image placeholders.
        """
        raise NotImplementedError(f"{type(self).__name__}.encode_images")

    # ---- sequence --------------------------------------------------------------------------

    def position_ids(
        self, input_ids_BT: Tensor, valid_BT: Tensor, images: ImageInputs, plain: Tensor
    ) -> Tensor:
        """Position ids int64 of rows with images, [3, B, T] (`has_mrope`) or [B, T].

        Args:
            plain: the same as if all positions were text.
        """
        return plain

    def forward_inputs(
        self, input_ids_BT: Tensor, images: ImageInputs
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The ids and the other arguments that `base` takes to see images at placeholders."""
        return input_ids_BT, {name: getattr(images, name) for name in self.image_arguments}

    def mask_unpredicted(self, logits: Tensor) -> Tensor:
        """Logits as the model's own forward makes them.

        At `unpredicted_ids` that is the lowest finite number.
        """
        if not self.unpredicted_ids:
            return logits
        is_out_V = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
        is_out_V[self.unpredicted_ids] = True
        return logits.masked_fill(is_out_V, torch.finfo(logits.dtype).min)
