"""A record of LVR's JSON, one of ViRL39K and a row with a box, and what an error says of them."""

import json
import pickle

import numpy as np

from grpo_latent.data.rows import encode_png, verl_row

PNG = encode_png(np.full((28, 28, 3), 7, np.uint8))
RECORD = {
    "dataset": "flickr30k",
    "question_id": 31593,
    "image": ["a.png"],
    "conversations": [
        {"from": "human", "value": "<image>\nWhat does the child wear?"},
        {"from": "gpt", "value": "<lvr>\n<answer> Blue denim shorts. </answer>"},
    ],
    "bboxes": [[0.382, 0.456, 0.718, 0.656]],
}
VIRL = {
    "dataset": "ViRL39K",
    "id": "MMK12-0",
    "image": "a.png",
    "conversations": [
        {"from": "human", "value": "How many pairs?"},
        {"from": "gpt", "value": "<answer>4</answer>"},
    ],
}
ROW = verl_row(
    data_source="digits",
    prompt="read red ?<image>",
    images=[PNG],
    answer="7",
    index=0,
    split="sft",
    bboxes=[(0, 0, 0.5, 0.5)],
)


def write_json(folder, *records):
    path = folder / "data.json"
    path.write_text(json.dumps(records))
    return path


def assert_complete(error, row, field, got):
    """The error names row, field, what was got and expected, and a fix, and survives pickling."""
    assert error.where.endswith(f"row {row}: {field}")
    assert got in str(error) and error.expected and error.fix
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
