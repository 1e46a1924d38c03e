"""What SFT holds in memory: one step's pixels, and `cache_bytes` of others.

No image that is not being encoded.
"""

import weakref

import pytest
from ilvr_cases import PLANS, record, write_images
from sft_cases import encoder, examples, latent_model, trainer

from grpo_latent.data.formats.ilvr_jsonl import parse_ilvr_record
from grpo_latent.data.image_refs import ImageRef
from grpo_latent.errors import DataError
from grpo_latent.sft.common.dataset import SFTDataset, pixel_bytes
from grpo_latent.sft.ilvr.rows import ILVREncoder

ROWS = examples(8)


class Alive:
    """Counts objects that have been made and not been freed yet."""

    def __init__(self):
        self.now = self.most = self.made = 0

    def add(self, item):
        self.made += 1
        self.now += 1
        self.most = max(self.most, self.now)
        weakref.finalize(item, self._freed)
        return item

    def _freed(self):
        self.now -= 1


@pytest.fixture
def images(monkeypatch):
    """Decoded images."""
    alive, open_image = Alive(), ImageRef.open
    monkeypatch.setattr(ImageRef, "open", lambda self: alive.add(open_image(self)))
    return alive


def counting_rows(dataset):
    """Counts the rows of a data set, whose pixels live as long as they do."""
    alive, encode = Alive(), dataset.encoder
    dataset.encoder = lambda example: alive.add(encode(example))
    return alive


@pytest.mark.parametrize("num_kept", [0, 3])
def test_training_holds_one_image_and_the_rows_of_a_batch(tmp_path, images, num_kept):
    run = trainer(
        latent_model("qwen2_5_vl"), ROWS, tmp_path, per_device_train_batch_size=2, max_steps=8
    )
    run.train_dataset._bytes_left = num_kept * pixel_bytes(run.train_dataset[0])
    rows = counting_rows(run.train_dataset)
    run.train()
    run.release()
    epochs = 8 * 2 // len(ROWS)
    assert images.most == 1, "an image lives while its row is encoded"
    assert rows.made == num_kept + epochs * (len(ROWS) - num_kept), (
        "each epoch encodes what is not kept"
    )
    assert num_kept <= rows.most <= num_kept + 2, (
        "beside the kept ones, the rows of the batch that is put together"
    )


def ilvr_dataset(folder, cache_bytes=0):
    latent = latent_model(exit="end_token", steps=3)
    write_images(folder)
    rows = [parse_ilvr_record(record(*plan), f"row {i}", folder) for i, plan in enumerate(PLANS)]
    return SFTDataset(rows, ILVREncoder.of_model(latent), cache_bytes)


def test_helper_images_count_against_the_bound(tmp_path):
    row = ilvr_dataset(tmp_path)[0]
    own, helpers = row.images.pixel_values.nbytes, row.helper_images.pixel_values.nbytes
    assert pixel_bytes(row) == own + helpers > own
    tight, enough = (ilvr_dataset(tmp_path, size) for size in (own + helpers - 1, own + helpers))
    assert tight[0] is not tight[0] and enough[0] is enough[0]


def test_dataset_keeps_rows_up_to_its_bound():
    latent = latent_model("qwen2_5_vl")
    size = encoder(latent)(ROWS[0]).images.pixel_values.nbytes
    dataset = SFTDataset(ROWS[:3], encoder(latent), cache_bytes=2 * size)
    first = [dataset[index] for index in range(3)]
    assert [dataset[index] is row for index, row in enumerate(first)] == [True, True, False]


def test_no_rows_are_refused():
    with pytest.raises(DataError, match="no examples"):
        SFTDataset([], encoder(latent_model()))
