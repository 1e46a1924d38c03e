"""Puts this folder on sys.path, so that the rooms below share its helper modules."""

import pytest
from folder_cases import digests
from run_cases import WORDS, write_boxed_rows

from grpo_latent.data.formats.lvr_json import write_lvr_json
from grpo_latent.data.rows import read_verl_parquet
from grpo_latent.models import tiny


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A base model without latent tokens, and rows in both formats. Unchanged at the end."""
    folder = tmp_path_factory.mktemp("inputs")
    model, tokenizer, processor = tiny.tiny_qwen2_5_vl(WORDS, latent_tokens=())
    model.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    write_boxed_rows(folder / "rows.parquet", 10)
    write_lvr_json(folder / "rows.json", read_verl_parquet(folder / "rows.parquet"))
    before = digests(folder)
    yield folder
    assert digests(folder) == before, "a run wrote to its inputs"
