"""Which settings a resumed run may change."""

import json

import pytest
from run_cases import compose_sft, settings_from

from grpo_latent.errors import ConfigError
from grpo_latent.sft.resuming import as_dict, check_same_run


def settings_of(tmp_path, **values):
    paths = {"model.path": "m", "data.train_files": "d", "trainer.output_dir": str(tmp_path)}
    return settings_from(compose_sft(paths | {f"trainer.{k}": v for k, v in values.items()}))


def write(tmp_path, settings, world_size, older=()):
    values = as_dict(settings, world_size)
    kept = {name: value for name, value in values.items() if name not in older}
    (tmp_path / "settings.json").write_text(json.dumps(kept))


def test_settings_stay_but_for_how_long_it_goes_on(tmp_path):
    settings = settings_of(tmp_path)
    write(tmp_path, settings, 1)
    check_same_run(settings, tmp_path, 1)
    check_same_run(settings_of(tmp_path, max_steps=9, save_steps=3), tmp_path, 1)
    with pytest.raises(ConfigError, match=r"trainer\.seed"):
        check_same_run(settings_of(tmp_path, seed=1), tmp_path, 1)


def test_a_run_of_an_older_release_goes_on(tmp_path):
    settings = settings_of(tmp_path)
    write(tmp_path, settings, 2, older=("world_size", "trainer.fsdp"))
    check_same_run(settings, tmp_path, 2)


def test_shards_move_where_a_step_keeps_its_batches(tmp_path):
    write(tmp_path, settings_of(tmp_path, fsdp=True, gradient_accumulation_steps=2), 4)
    four = settings_of(tmp_path, fsdp=True, gradient_accumulation_steps=4)
    check_same_run(four, tmp_path, 2)
    with pytest.raises(ConfigError, match="as many batches a step"):
        check_same_run(four, tmp_path, 4)
    write(tmp_path, settings_of(tmp_path, gradient_accumulation_steps=2), 4)
    with pytest.raises(ConfigError, match="world_size"):
        check_same_run(settings_of(tmp_path, gradient_accumulation_steps=4), tmp_path, 2)
