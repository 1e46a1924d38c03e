"""Which family a config belongs to; an unknown one is refused by name.

Wherever a model is built from a folder.
"""

import pytest
import torch
from transformers import (
    AutoConfig,
    ChameleonConfig,
    FuyuConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MambaConfig,
    MistralConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen3Config,
    Qwen3VLConfig,
)

from grpo_latent.backbones import chameleon, qwen2_5_vl, qwen2_vl, qwen3_vl, registry
from grpo_latent.backbones.protocol import Backbone
from grpo_latent.backbones.text import TextBackbone
from grpo_latent.errors import ConfigError
from grpo_latent.latent.mechanisms import LVR
from grpo_latent.models import tiny
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.loading import load_latent_model
from grpo_latent.rollout.vllm.skeleton import read_skeleton
from grpo_latent.sft.common import loading as sft_loading

KNOWN = {
    Qwen2VLConfig: qwen2_vl.Qwen2VL,
    Qwen2_5_VLConfig: qwen2_5_vl.Qwen2_5VL,
    Qwen3VLConfig: qwen3_vl.Qwen3VL,
    ChameleonConfig: chameleon.Chameleon,
    Qwen2Config: TextBackbone,
    Qwen3Config: TextBackbone,
    LlamaConfig: TextBackbone,
}
# a part for images (Fuyu, though it is registered as a causal LM), a recurrent state, a window
# that no layer type names
UNKNOWN = (LlavaConfig, FuyuConfig, MambaConfig, MistralConfig)
REFUSAL = (
    r"got llava; expected one of chameleon, .*qwen2_5_vl, .*or a text model"
    r".*protocol.py.*GRPO_LATENT_BACKBONES"
)


@pytest.mark.parametrize("config_class", KNOWN)
def test_families_of_configs(config_class):
    assert registry.find_backbone(config_class()) is KNOWN[config_class]


@pytest.mark.parametrize("config_class", UNKNOWN)
def test_unknown_families_are_refused_by_name(config_class):
    with pytest.raises(
        ConfigError, match=f"no backbone for this family.*got {config_class.model_type};"
    ):
        registry.find_backbone(config_class())


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """The folder of a tiny LLaVA, which was once taken for a text model.

    No weights, as no place gets as far.
    """
    folder = tmp_path_factory.mktemp("llava")
    tokenizer = tiny.word_tokenizer(("read",))
    text = dict(
        model_type="qwen3", vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16
    )
    text |= dict(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8)
    vision = dict(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=14,
    )
    LlavaConfig(text_config=text, vision_config=vision).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    LVR.from_tokens(tokenizer.get_vocab()).save(folder)
    return folder


def test_loading_refuses(llava):
    with pytest.raises(ConfigError, match=REFUSAL):
        load_latent_model(llava)


def test_sft_refuses(llava):
    with pytest.raises(ConfigError, match=REFUSAL):
        sft_loading.load_plain(str(llava), torch.float32, "sdpa")


def test_engine_vllm_refuses(llava):
    with pytest.raises(ConfigError, match=REFUSAL):
        read_skeleton(llava)


def test_rl_refuses_before_workers_start(llava):
    pytest.importorskip("verl")
    from grpo_latent.verl_plugin.boot.layout import check_model

    with pytest.raises(ConfigError, match=f"actor_rollout_ref.model.path.*{REFUSAL}"):
        check_model(AutoConfig.from_pretrained(llava))
    with pytest.raises(ConfigError, match="got a Chameleon model"):
        check_model(ChameleonConfig())


def test_a_model_in_memory_is_refused(llava):
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(LlavaConfig.from_pretrained(llava))
    with pytest.raises(ConfigError, match=REFUSAL):
        ModelAdapter(model)


def test_qwen3_vl_on_vllm_needs_its_sections_interleaved():
    config = Qwen3VLConfig()
    config.text_config.rope_parameters = {"mrope_section": [4, 6, 6]}
    with pytest.raises(ConfigError, match="here: text_config.rope_parameters.mrope_interleaved"):
        registry.find_backbone(config).check_vllm(config, "here")
    config.text_config.rope_parameters["mrope_interleaved"] = True
    registry.find_backbone(config).check_vllm(config, "here")


class Elsewhere(Backbone):
    """A family that a user has outside the package."""

    model_types = ("llava",)
    processor_names = ("LlavaProcessor",)


def test_a_class_elsewhere_is_found_by_the_variable(llava, monkeypatch):
    monkeypatch.setenv(registry.VARIABLE, f"{__name__}:Elsewhere")
    try:
        assert registry.find_backbone(LlavaConfig.from_pretrained(llava)) is Elsewhere
        assert "llava" in registry.known_model_types()
    finally:
        registry.BACKBONES.pop("llava")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("nowhere:Class", "cannot import the backbone"),
        (f"{__name__}:Nothing", "cannot import the backbone"),
        (f"{__name__}:KNOWN", "not a backbone"),
        ("plain", "cannot import the backbone"),
    ],
)
def test_a_variable_that_names_no_backbone_is_an_error(name, problem, monkeypatch):
    monkeypatch.setenv(registry.VARIABLE, name)
    with pytest.raises(
        ConfigError, match=f"{registry.VARIABLE}: {problem}.*package.module:NAME of a backbone"
    ):
        registry.find_backbone(Qwen3Config())


def test_two_classes_for_one_type_are_an_error():
    class Other(Backbone):
        model_types = ("qwen3_vl",)

    with pytest.raises(ConfigError, match="two backbones of one name.*qwen3_vl of "):
        registry.register(Other)
