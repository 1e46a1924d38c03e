"""Pixels are bounded by batch and bytes, and are the same whenever they are made."""

import hashlib
import json

import pytest
import torch
from test_evaluate_entry import config_for, files  # noqa: F401, a fixture

from grpo_latent.backbones.images import ImageInputs
from grpo_latent.errors import ConfigError
from grpo_latent.eval.evaluate import PromptsDigest
from grpo_latent.eval.pixels import PixelStore, StoredImages, held
from grpo_latent.eval.prompts import read_prompts
from grpo_latent.evaluate import run

GRID = torch.tensor([[1, 2, 2]])


def stored(store, num, log):
    """Images of 16 bytes each, that write into `log` when their pixels are made anew."""

    def make(index):
        log.append(index)
        return torch.full((4,), float(index))

    return [
        store.add(ImageInputs(torch.full((4,), float(i)), GRID), lambda index=i: make(index))
        for i in range(num)
    ]


def test_pixels_that_do_not_fit_are_made_anew_and_equal():
    log = []
    images = stored(PixelStore(max_bytes=40), 4, log)
    assert [int(image.pixel_values[0]) for image in images[2:]] == [2, 3] and log == [], (
        "the last two fit"
    )
    assert [int(image.pixel_values[0]) for image in images] == [0, 1, 2, 3] and log == [0, 1, 2, 3]
    assert int(images[2].pixel_values[0]) == 2 and log == [0, 1, 2, 3]
    assert all(torch.equal(image.image_grid_thw, GRID) for image in images) and len(log) == 4, (
        "grids need no pixels"
    )


def test_what_is_held_is_made_once_however_little_fits():
    log, store = [], PixelStore(max_bytes=0)
    images = stored(store, 4, log)
    with held([images[0], None, images[1]]):
        for _ in range(3):
            assert [int(image.pixel_values[0]) for image in images[:2]] == [0, 1]
        assert log == [0, 1]
        _ = images[2].pixel_values, images[2].pixel_values
        assert log == [0, 1, 2, 2], "others are not kept"
    assert store._num_bytes == 0 and not store._kept
    with pytest.raises(ZeroDivisionError), held(images):
        _ = images[0].pixel_values, 1 / 0
    assert store._num_bytes == 0, "nothing is held after an exception"


def without_times(report):
    report = json.loads(json.dumps(report))
    del report["seconds"], report["provenance"]["date"]
    for decoding in (report["greedy"], report["sampled"]):
        decoding.pop("seconds_per_question")
    return report


def test_an_evaluation_keeps_one_batch_of_pixels_and_gives_the_same_report(
    files,  # noqa: F811
    monkeypatch,
    tmp_path,
    request,
):
    folder, _, _ = files
    monkeypatch.chdir(request.config.rootpath)
    kept, keep = [], PixelStore._keep

    def watched(store, key, pixels):
        keep(store, key, pixels)
        kept.append((store._num_bytes, len(store._kept)))

    monkeypatch.setattr(PixelStore, "_keep", watched)
    # sampled trajectories are drawn batch by batch, so both runs have the same batches
    options = (
        "rollout.n=2",
        "prompts_per_batch=2",
        "ablations=[shuffle,image_swap]",
        f"output={tmp_path / 'r.json'}",
    )
    whole = run(config_for(folder, *options))
    assert max(count for _, count in kept) == 6, "all fit"
    del kept[:]
    bounded = run(config_for(folder, *options, "data.cache_bytes=0"))
    assert max(count for _, count in kept) == 2
    assert without_times(bounded) == without_times(whole)


def test_the_digest_is_that_of_ids_truths_and_pixels(files):  # noqa: F811
    folder, _, loaded = files
    digest, expected = PromptsDigest(), hashlib.blake2b(digest_size=16)
    store = PixelStore(0)
    prompts = read_prompts([folder / "read.parquet"], loaded, store=store, seen=digest.add)
    assert all(isinstance(prompt.images, StoredImages) for prompt in prompts)
    for prompt in prompts:
        expected.update(
            json.dumps([prompt.row_id, prompt.prompt_ids.tolist(), prompt.ground_truth]).encode()
        )
        expected.update(prompt.images.pixel_values.float().numpy().tobytes())
    assert digest.hexdigest() == expected.hexdigest()


@pytest.mark.parametrize("size", ["-1", "1.5", "null"])
def test_an_unusable_bound_is_named(files, size):  # noqa: F811
    with pytest.raises(ConfigError, match="data.cache_bytes"):
        run(config_for(files[0], f"data.cache_bytes={size}"))
