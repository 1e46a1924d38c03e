"""What only looks like a published layout, or is a damaged one, is refused by name."""

import pytest
from published_cases import LAYOUTS, write

from grpo_latent.errors import CheckpointError, ConfigError
from grpo_latent.models.loading import load_latent_model
from grpo_latent.rollout.vllm.skeleton import read_skeleton


@pytest.mark.parametrize(
    ("system", "fields", "match"),
    [
        ("SkiLa", {"sketch_token_num": "many"}, "sketch_token_num"),
        ("SkiLa", {"sketch_token_num": True}, "sketch_token_num"),
        ("SkiLa", {}, "sketch_token_num"),
        ("SkiLa", {"sketch_token_num": 3, "skila_id": 0}, "skila_id"),
        ("SwimBird", {"max_latent_token": 0}, "max_latent_token"),
        ("HyLaR", {"canvas_token_num": 5, "canvas_end_id": 0}, "canvas_end_id"),
    ],
)
def test_damaged_layouts_are_typed_errors(system, fields, match, tmp_path):
    folder = write(tmp_path, system, fields=fields)
    with pytest.raises(CheckpointError, match=match) as caught:
        load_latent_model(folder)
    assert caught.value.what.startswith(f"not a {system} checkpoint")


def test_a_folder_of_two_systems_is_refused(tmp_path):
    tokens = LAYOUTS["SkiLa"][2] + LAYOUTS["HyLaR"][2]
    keys = LAYOUTS["SkiLa"][3] + LAYOUTS["HyLaR"][3]
    fields = LAYOUTS["SkiLa"][4] | LAYOUTS["HyLaR"][4]
    folder = write(tmp_path, "SkiLa", tokens, keys, fields)
    with pytest.raises(CheckpointError, match="a checkpoint of two systems.*SkiLa.*HyLaR"):
        load_latent_model(folder)


LOOK_ALIKES = {
    "the LVR pipeline": {"file": "lvr_config.json"},
    "S-LVR": {"fields": {"slvr_id": 1, "slvr_start_id": 2}},
    "Mull-Tokens": {"fields": {"latent_size": 4, "imagelatent_token_id": 9, "latent_token_id": 7}},
    "CoVT": {"tokens": ("<|anchor_start|>", "<|anchor_end|>", "<|sam_pad|>")},
    "LaViT": {"fields": {"v_top_dim": 8, "training_stage": 2}},
    "VisMem": {"tokens": ("<ms_I>", "<ms_E>", "<ml_I>", "<ml_E>")},
    "a SwimBird with a projection head": {
        "system": "SwimBird",
        "fields": {"max_latent_token": 3, "use_projection_head": True},
    },
}


@pytest.mark.parametrize("name", list(LOOK_ALIKES))
def test_look_alikes_are_refused_by_name(name, tmp_path):
    case = LOOK_ALIKES[name]
    system = case.get("system", "ILVR")
    tokens = case.get("tokens")
    keys = None if tokens is None else ()
    folder = write(tmp_path, system, tokens, keys, case.get("fields", {}))
    if "file" in case:
        (folder / case["file"]).write_text("{}")
    for read in (load_latent_model, read_skeleton):
        with pytest.raises(CheckpointError, match=f"a checkpoint of {name}"):
            read(folder)


@pytest.mark.parametrize(
    ("files", "name"),
    [
        (("adapter_config.json",), "an adapter alone"),
        (("lvr_config.json", "qwen"), "LVR pipeline"),
    ],
)
def test_folders_without_a_model_are_refused_by_name(files, name, tmp_path):
    for file in files:
        (tmp_path / file).write_text("{}")
    with pytest.raises(CheckpointError, match=name):
        load_latent_model(tmp_path)


def test_settings_that_do_not_go_together(tmp_path):
    mechanism = load_latent_model(write(tmp_path, "ILVR")).mechanism
    for changes, where in (
        ({"start": "forced"}, "latent.start_is_action"),
        ({"first_latent": "at_start", "head": "mlp"}, "latent.head"),
        (
            {"first_latent": "at_start", "start": "forced", "start_is_action": False},
            "latent.start",
        ),
        ({"first_latent": "there"}, "latent.first_latent"),
    ):
        with pytest.raises(ConfigError, match=where):
            mechanism.replace(**changes)
