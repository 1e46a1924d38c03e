"""Configs as transformers 4.5x and authors of published models wrote them, read as 5 means them.

Whether logits share the embeddings:

    transformers 4.5x   decides by `text_config`, and leaves the flag of the top level out
    transformers 5      decides by the top level, where a flag that is left out is False

A small Qwen-VL that was trained under the first has no `lm_head.weight`, and loading it under the
second misses that. And `architectures` names classes of the authors' own, which vLLM looks up.

What is repaired is the config's class, once a process, and not each place that loads: our loaders,
verl's actor and vLLM all build a folder's config by this one method, and the folder is left alone.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

_FLAG = "tie_word_embeddings"
_ARCHITECTURES = "architectures"
# their weights are those of the stock class, and latents are what they add
AUTHORS_CLASSES = {
    "QwenWithLVR": "Qwen2_5_VLForConditionalGeneration",
    "QwenWithLaser": "Qwen2_5_VLForConditionalGeneration",
    "SkiLa": "Qwen2_5_VLForConditionalGeneration",
}


def with_outer_flag(config_dict: dict[str, Any]) -> dict[str, Any]:
    """A config.json whose top level says whether logits share the embeddings.

    A top level that says so already is believed.

    >>> with_outer_flag({"text_config": {"tie_word_embeddings": True}})["tie_word_embeddings"]
    True
    >>> config = {"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}
    >>> with_outer_flag(config)["tie_word_embeddings"]
    False
    """
    inner = config_dict.get("text_config")
    inner = inner.to_dict() if isinstance(inner, PreTrainedConfig) else inner
    if _FLAG in config_dict or not isinstance(inner, dict) or _FLAG not in inner:
        return config_dict
    return config_dict | {_FLAG: inner[_FLAG]}


def with_stock_class(config_dict: dict[str, Any]) -> dict[str, Any]:
    """A config.json whose `architectures` are Hugging Face's.

    >>> with_stock_class({"architectures": ["QwenWithLVR"]})
    {'architectures': ['Qwen2_5_VLForConditionalGeneration']}
    """
    names = config_dict.get(_ARCHITECTURES) or []
    if AUTHORS_CLASSES.keys().isdisjoint(names):
        return config_dict
    return config_dict | {_ARCHITECTURES: [AUTHORS_CLASSES.get(name, name) for name in names]}


def read_as_published(model_type: str) -> None:
    """Makes this process read all configs of a model type so; idempotent."""
    config_class: Any = CONFIG_MAPPING[model_type]
    if "_reads_as_published" in vars(config_class):
        return
    stock = config_class.from_dict.__func__

    def from_dict(cls: type, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        return stock(cls, with_stock_class(with_outer_flag(config_dict)), **kwargs)

    config_class.from_dict = classmethod(from_dict)
    config_class._reads_as_published = True
