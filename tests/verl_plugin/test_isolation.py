"""Tests of other folders find transformers as it is, whatever verl did to it before.

The order of folders is not tested.
"""

from types import SimpleNamespace

from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen2_5_vl
from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3_vl
from unpatched import transformers_as_it_was
from verl.models.transformers.monkey_patch import apply_monkey_patch


def fake_model(model_type):
    text = SimpleNamespace(num_attention_heads=2, num_key_value_heads=2)
    return SimpleNamespace(
        config=SimpleNamespace(model_type=model_type, text_config=text), __module__="builtins"
    )


def test_what_verl_patches_is_taken_back():
    owners = (qwen2_5_vl.Qwen2_5_VLModel, qwen2_5_vl.Qwen2_5_VLAttention, qwen3_vl.Qwen3VLModel)
    before = [dict(vars(owner)) for owner in owners]
    vision_before = dict(vars(qwen3_vl.Qwen3VLVisionModel))
    with transformers_as_it_was():
        for model_type in ("qwen2_5_vl", "qwen3_vl"):
            apply_monkey_patch(
                fake_model(model_type), use_remove_padding=model_type == "qwen2_5_vl"
            )
        assert all(
            vars(owner) != attributes for owner, attributes in zip(owners, before, strict=True)
        )
    assert [dict(vars(owner)) for owner in owners] == before
    assert dict(vars(qwen3_vl.Qwen3VLVisionModel)) == vision_before
