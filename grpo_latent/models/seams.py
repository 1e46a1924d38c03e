"""What this package uses of transformers beyond its documented names, as a table.

`tests/models/test_seams.py` compares it with the installed release; `make versions` does so with
those at the ends of setup.py's range.
"""

from __future__ import annotations

from grpo_latent.common.seams import Seam

_CACHE = "transformers.cache_utils"
_QWEN = "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl:Qwen2_5_VLModel"

SEAMS = (
    Seam(
        "rollout's cache",
        f"{_CACHE}:CacheLayerMixin",
        "subclassed by models/kv_cache.py, which has these methods",
        abstract=frozenset(
            {
                "get_mask_sizes",
                "get_max_cache_shape",
                "get_seq_length",
                "lazy_initialization",
                "update",
            }
        ),
    ),
    Seam(
        "layers of a cache",
        f"{_CACHE}:Cache.__init__",
        "a cache is made of layers that are filled already",
        ("self", "layers", "layer_class_to_replicate", "offloading", "offload_only_non_sliding"),
    ),
    Seam(
        "linear attention",
        f"{_CACHE}:LinearAttentionCacheLayerMixin",
        "models with such layers are refused",
    ),
    Seam(
        "attention by name",
        "transformers.modeling_utils:ALL_ATTENTION_FUNCTIONS.register",
        "folded, shared and recorded attention stand in a config under names of ours",
    ),
    Seam(
        "masks by name",
        "transformers.masking_utils:ALL_MASK_ATTENTION_FUNCTIONS.register",
        "they take the masks of sdpa",
    ),
    Seam(
        "attention",
        "transformers.integrations.sdpa_attention:sdpa_attention_forward",
        "called where ours has nothing to add",
        (
            "module",
            "query",
            "key",
            "value",
            "attention_mask",
            "dropout",
            "scaling",
            "is_causal",
            "kwargs",
        ),
    ),
    Seam(
        "attention of a shared prompt, on CUDA",
        "transformers.integrations.flex_attention:flex_attention_forward",
        "called with a block mask of ours",
    ),
    Seam(
        "images to vectors",
        f"{_QWEN}.get_image_features",
        "each image is encoded once",
        ("self", "pixel_values", "image_grid_thw", "kwargs"),
    ),
    Seam("positions", f"{_QWEN}.get_rope_index", "ids of prompts with images"),
    Seam(
        "models by config",
        "transformers.models.auto.modeling_auto:MODEL_FOR_CAUSAL_LM_MAPPING",
        "says which folders hold a text model",
    ),
    Seam(
        "configs by name",
        "transformers.models.auto.configuration_auto:CONFIG_MAPPING",
        "published folders name classes that it lacks",
    ),
    Seam(
        "images without torchvision",
        "transformers.models.qwen2_vl.image_processing_pil_qwen2_vl:Qwen2VLImageProcessorPil",
        "prepares images alike with and without torchvision",
    ),
)
