"""Whole SFT runs: configs as the command composes them, and rows for them in verl's schema."""

from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from sft_cases import examples

import grpo_latent.config
from grpo_latent.data.rows import verl_row, write_verl_parquet
from grpo_latent.sft.settings import SFTSettings

CONFIG_DIR = str(Path(grpo_latent.config.__file__).parent)
WORDS = ("read", "red", "blue", "green", "?")


def compose_sft(values, name="sft", overrides=()):
    """The config of `python -m grpo_latent.sft`, with `values` by their dotted keys."""
    with initialize_config_dir(CONFIG_DIR, version_base=None):
        config = compose(name, overrides=list(overrides))
    # values may be keys that the config does not have: a refusal is the settings' own
    OmegaConf.set_struct(config, False)
    for key, value in values.items():
        OmegaConf.update(config, key, value)
    return config


def settings_from(config):
    return SFTSettings.from_dict(OmegaConf.to_container(config, resolve=True))


def write_boxed_rows(path, num_rows):
    """Rows with a box each, every third without its answer."""
    rows = [
        verl_row(
            data_source="test",
            prompt="".join(part.get("text", "<image>") for part in item.messages[0]["content"]),
            images=[image.data for image in item.images],
            answer=item.answer or None,
            index=index,
            split="train",
            bboxes=item.boxes,
        )
        for index, item in enumerate(examples(num_rows))
    ]
    write_verl_parquet(path, rows)
