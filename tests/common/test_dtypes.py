import pytest
import torch

from grpo_latent.common.dtypes import DTYPES, parse_dtype
from grpo_latent.errors import ConfigError


def test_names_of_torch_and_of_verl_mean_the_same():
    for long, short in (("float32", "fp32"), ("bfloat16", "bf16"), ("float16", "fp16")):
        assert parse_dtype(long) is parse_dtype(short) is getattr(torch, long)
    assert len(DTYPES) == 6


def test_another_name_is_refused_with_its_setting():
    with pytest.raises(ConfigError, match="model.dtype: unknown dtype; got float99"):
        parse_dtype("float99", "model.dtype")
