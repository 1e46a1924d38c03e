"""What the driver finds in a run's files before Ray starts, and what the data set then gives verl."""

import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf
from PIL import Image
from row_cases import (
    GOOD,
    PICTURE,
    PNG,
    ROW,
    changed,
    encoded,
    half,
    write_like_geo3k,
    write_lines,
)
from verl.utils.tokenizer import hf_processor, hf_tokenizer

from grpo_latent.data.rows import write_verl_parquet
from grpo_latent.errors import ConfigError, DataError
from grpo_latent.models import tiny
from grpo_latent.verl_plugin.trainer.data_check import check_data
from grpo_latent.verl_plugin.trainer.dataset import LatentDataset


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model, _, processor = tiny.tiny_qwen2_5_vl(("read", "red", "?"))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def config_of(model, train, val=None, trainer=None, **data):
    trainer = {
        "resume_mode": "disable",
        "total_training_steps": None,
        "total_epochs": 2,
        "val_only": False,
    } | (trainer or {})
    data = {
        "train_files": str(train),
        "val_files": str(val or train),
        "train_batch_size": 2,
        "max_prompt_length": 64,
        "filter_overlong_prompts": False,
    } | data
    return OmegaConf.create(
        {"actor_rollout_ref": {"model": {"path": model}}, "data": data, "trainer": trainer}
    )


def dataset_of(model, paths, **data):
    config = OmegaConf.create({"max_prompt_length": 64, "filter_overlong_prompts": False} | data)
    processor = hf_processor(model)
    return LatentDataset(list(map(str, paths)), hf_tokenizer(model), config, processor)


def rows_of(count, **changes):
    return [changed(ROW | changes, ("extra_info", "index"), index) for index in range(count)]


def images_of(dataset, item):
    messages = dataset[item]["raw_prompt"]
    return dataset._process_multi_modal_info(messages, 7, OmegaConf.create({}))[0]


WIDE = [{"bytes": encoded(Image.new("RGB", (56, 560))), "path": None}]


def test_good_rows_pass_with_a_bar(model, tmp_path):
    write_verl_parquet(tmp_path / "rows.parquet", rows_of(4))
    assert check_data(config_of(model, tmp_path / "rows.parquet")) == []


def test_a_bad_row_of_the_last_file_is_named(model, tmp_path):
    write_verl_parquet(tmp_path / "a.parquet", rows_of(4))
    bad = rows_of(9)
    bad[8]["images"] = [{"bytes": half(encoded(format="JPEG")), "path": None}]
    write_verl_parquet(tmp_path / "b.parquet", bad)
    config = config_of(model, tmp_path / "a.parquet", tmp_path / "b.parquet")
    for filter_overlong in (False, True):
        config.data.filter_overlong_prompts = filter_overlong
        with pytest.raises(DataError, match="b.parquet row 8: images.0.: not a readable image"):
            check_data(config)


def test_an_image_larger_than_the_prompt(model, tmp_path):
    """verl drops the row in silence, or ends in the middle of the run."""
    path = tmp_path / "rows.parquet"
    write_verl_parquet(
        path, [*rows_of(3), changed(ROW, ("extra_info", "index"), 3) | {"images": WIDE}]
    )
    with pytest.raises(
        DataError, match="rows.parquet row 3: a prompt is too long; got 167 tokens"
    ):
        check_data(config_of(model, path))
    notes = check_data(config_of(model, path, filter_overlong_prompts=True))
    assert [note.split(",")[0] for note in notes] == [
        "data.train_files: 1 of 4 rows are left out",
        "data.val_files: 1 of 4 rows are left out",
    ]
    for filter_overlong in (False, True):
        config = config_of(model, path, filter_overlong_prompts=filter_overlong)
        config.data.max_prompt_length = 3
        with pytest.raises(DataError, match="4 of 4 rows are too long") as caught:
            check_data(config)
        assert "filter_overlong" not in caught.value.fix


def test_fewer_rows_than_a_batch(model, tmp_path):
    """verl divides by zero."""
    path = tmp_path / "rows.parquet"
    write_verl_parquet(path, rows_of(3))
    with pytest.raises(ConfigError, match="data.train_batch_size: a batch larger than the data"):
        check_data(config_of(model, path, train_batch_size=4))
    with pytest.raises(ConfigError, match="got 3, 2 rows"):
        check_data(config_of(model, path, train_batch_size=3, train_max_samples=2))
    wide = changed(ROW, ("extra_info", "index"), 3) | {"images": WIDE}
    write_verl_parquet(path, [*rows_of(3), wide])
    with pytest.raises(ConfigError, match="got 4, 3 rows"):
        check_data(config_of(model, path, train_batch_size=4, filter_overlong_prompts=True))


@pytest.mark.parametrize(
    ("total", "epochs", "message"),
    [
        (5, 1, "past its last step"),
        (None, 2, "past its last step; got 4"),
        (6, 1, None),
        (7, 1, ""),
    ],
)
def test_steps_that_are_taken(total, epochs, message, model, tmp_path):
    """verl says "done", and nothing else."""
    path = tmp_path / "rows.parquet"
    write_verl_parquet(path, rows_of(4))
    (tmp_path / "global_step_6").mkdir()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("6")
    trainer = {
        "resume_mode": "auto",
        "default_local_dir": str(tmp_path),
        "total_training_steps": total,
        "total_epochs": epochs,
    }
    config = config_of(model, path, trainer=trainer)
    if message:
        with pytest.raises(ConfigError, match=message):
            check_data(config)
    elif message is None:
        (note,) = check_data(config)
        assert note.startswith("all 6 steps are taken")
    else:
        assert check_data(config) == []


# ---- what the data set gives verl -----------------------------------------------------------


def test_images_that_datasets_types(model, tmp_path):
    path = tmp_path / "rows.parquet"
    write_like_geo3k(path)
    assert check_data(config_of(model, path)) == []
    dataset = dataset_of(model, [path])
    assert images_of(dataset, 1)[0].tobytes() == PICTURE.tobytes()
    assert dataset[1]["index"] == 1 and "images" not in dataset[1]


def test_transparent_typed_images_are_over_white(model, tmp_path):
    """verl's own way from such a column puts them over black."""
    clear = Image.new("RGBA", (56, 56), (0, 0, 0, 0))
    features = datasets.Features({"images": [datasets.Image()]})
    images = datasets.Dataset.from_dict({"images": [[clear]]}, features=features)
    rest = datasets.Dataset.from_list([{k: v for k, v in GOOD.items() if k != "images"}])
    path = tmp_path / "rows.parquet"
    datasets.concatenate_datasets([images, rest], axis=1).to_parquet(str(path))
    (picture,) = images_of(dataset_of(model, [path]), 0)
    assert picture.getpixel((0, 0)) == (255, 255, 255)


def test_files_whose_columns_differ(model, tmp_path):
    """`datasets` cannot join them: `path` is null in one, ground truths are numbers in one."""
    image = {"bytes": PNG, "path": None}
    tables = {
        "a": ({**ROW, "extra_info": {"index": 0}, "images": [image]}, "7"),
        "b": ({**ROW, "extra_info": {"index": "x"}, "images": [{**image, "path": "a.png"}]}, 7),
        "c": ({**ROW, "extra_info": json.dumps({"index": 2, "split": "rl"})}, 7.5),
    }
    paths = []
    for name, (row, truth) in tables.items():
        paths.append(tmp_path / f"{name}.parquet")
        row = changed(row, ("reward_model", "ground_truth"), truth)
        pq.write_table(pa.Table.from_pylist([row]), paths[-1])
    lines = tmp_path / "d.jsonl"
    (tmp_path / "a.png").write_bytes(PNG)
    images = {"images": [str(tmp_path / "a.png")]}
    write_lines(
        lines,
        changed(ROW | images, ("reward_model", "ground_truth"), "2026-11-28")
        | {"extra_info": {"index": 3}},
    )
    paths.append(lines)
    assert check_data(config_of(model, paths[0], train_batch_size=1)) == []
    dataset = dataset_of(model, paths)
    truths = [dataset[item]["reward_model"]["ground_truth"] for item in range(len(dataset))]
    assert truths == ["7", 7, 7.5, "2026-11-28"]
    assert [dataset[item]["index"] for item in range(4)] == [0, "x", 2, 3]
    for _ in range(2):  # verl writes into the messages that it is given
        assert [images_of(dataset, item)[0].size for item in range(4)] == [(56, 56)] * 4


def test_columns_of_other_names_are_read_by_all(model, tmp_path):
    """With both columns there, verl trains on one, and checks looked at the other."""
    row = {name: value for name, value in GOOD.items() if name != "images"}
    row |= {"question": ROW["prompt"], "prompt": [{"role": "user", "content": "read"}]}
    row |= {"pictures": ROW["images"]}
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([row]), path)
    keys = {"prompt_key": "question", "image_key": "pictures"}
    assert check_data(config_of(model, path, train_batch_size=1, **keys)) == []
    dataset = dataset_of(model, [path], **keys)
    assert images_of(dataset, 0)[0].size == (56, 56)
    (seen_by_usage,) = dataset.dataframe
    assert seen_by_usage["prompt"] == ROW["prompt"] and seen_by_usage["images"]


def test_the_filter_drops_what_is_too_long_and_nothing_else(model, tmp_path):
    path = tmp_path / "rows.parquet"
    wide = changed(ROW, ("extra_info", "index"), 9) | {"images": WIDE}
    write_verl_parquet(path, [*rows_of(2), wide, changed(ROW, ("extra_info", "index"), 4)])
    dataset = dataset_of(model, [path], filter_overlong_prompts=True)
    assert [row["extra_info"]["index"] for row in dataset.dataframe] == [0, 1, 4]
    assert len(dataset_of(model, [path])) == 4
    state = dataset.__getstate__()
    assert "dataframe" not in state
    dataset.resume_dataset_state()
    assert len(dataset) == 3


def test_samples_are_drawn_as_verl_draws_them(model, tmp_path):
    path = tmp_path / "rows.parquet"
    write_verl_parquet(path, rows_of(8))
    config = {
        "max_prompt_length": 64,
        "filter_overlong_prompts": False,
        "shuffle": True,
        "seed": 3,
    }
    arguments = (hf_tokenizer(model), OmegaConf.create(config), hf_processor(model))
    ours = LatentDataset(str(path), *arguments, max_samples=5)
    verls = LatentDataset.__bases__[0](str(path), *arguments, max_samples=5)
    assert [ours[item]["index"] for item in range(5)] == [
        verls[item]["index"] for item in range(5)
    ]


def test_remote_files_are_left_to_the_data_set(model):
    config = config_of(model, "s3://bucket/rows.parquet")
    assert check_data(config) == []
