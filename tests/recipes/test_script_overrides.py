"""What the recipes' scripts change on the command line of SFT is accepted by its config."""

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from grpo_latent.sft.settings import SFTSettings

ROOT = Path(__file__).parents[2]
GIVEN = (
    "hydra.searchpath=[pkg://grpo_latent.config]",
    "model.path=/model",
    "data.train_files=/rows.parquet",
    "trainer.output_dir=/out",
)


def sft_calls():
    """(script, config, overrides) of each `sft CONFIG …` in a recipe's scripts.

    Overrides in variables of the shell are left out.
    """
    for script in sorted(ROOT.glob("recipes/*/run.sh")):
        text = script.read_text().replace("\\\n", " ")
        configs = re.search(r"^CONFIGS=(\S+)", text, re.MULTILINE)
        for line in re.findall(r"^\s*sft (.+)$", text, re.MULTILINE):
            name, *words = shlex.split(line, comments=True)
            overrides = [word for word in words if "=" in word and "$" not in word]
            yield script.parent.name, configs[1], name, overrides


CALLS = list(sft_calls())


def test_scripts_have_calls_of_sft():
    assert len(CALLS) >= 8 and sum(bool(overrides) for *_, overrides in CALLS) >= 3


@pytest.mark.parametrize(("recipe", "configs", "name", "overrides"), CALLS)
def test_overrides_of_sft_are_accepted(recipe, configs, name, overrides):
    with initialize_config_dir(str(ROOT / configs), version_base=None):
        config = compose(name, overrides=[*GIVEN, *overrides])
    settings = SFTSettings.from_dict(OmegaConf.to_container(config, resolve=True))
    if "latent.steps=0" in overrides:
        assert settings.loss.boundaries(0, 10) == ()
