"""A row of verl's schema with a picture, and ways to spoil it."""

import copy
import io
import json

import numpy as np
from PIL import Image

from grpo_latent.data.rows import verl_row

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (56, 56, 3), dtype=np.uint8))


def encoded(image=PICTURE, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def half(data):
    return data[: len(data) // 2]


PNG = encoded()
ROW = verl_row(
    data_source="digits", prompt="read red ?<image>", images=[PNG], answer="7", index=1, split="rl"
)
GOOD = copy.deepcopy(ROW) | {"extra_info": ROW["extra_info"] | {"index": 0}}


def changed(value, path, new):
    """A deep copy of nested `value` with one item, at `path`, replaced.

    It is removed where `new` is KeyError.
    """
    value = copy.deepcopy(value)
    item = value
    for key in path[:-1]:
        item = item[key]
    if new is KeyError:
        del item[path[-1]]
    else:
        item[path[-1]] = new
    return value


def write_lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_like_geo3k(path, count=2):
    """As verl's preprocessing of geometry3k ends: `datasets` types the images."""
    import datasets  # the tests of rows alone run without it

    features = datasets.Features({"images": [datasets.Image()]})
    images = datasets.Dataset.from_dict({"images": [[PICTURE]] * count}, features=features)
    rest = [
        {
            "data_source": "hiyouga/geometry3k",
            "prompt": ROW["prompt"],
            "ability": "math",
            "reward_model": ROW["reward_model"],
            "extra_info": {"split": "train", "index": index},
        }
        for index in range(count)
    ]
    together = datasets.concatenate_datasets([images, datasets.Dataset.from_list(rest)], axis=1)
    together.to_parquet(str(path))
