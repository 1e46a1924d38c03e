"""What readers make of boxes that no image has: refuse the file, clamp the box, drop the row."""

import json

import numpy as np
import pytest

from grpo_latent.data.boxes import BadBoxes
from grpo_latent.data.formats.lvr_json import read_lvr_json
from grpo_latent.data.rows import encode_png, read_verl_parquet, verl_row, write_verl_parquet
from grpo_latent.errors import BadBoxError

PNG = encode_png(np.full((28, 28, 3), 7, np.uint8))
BOXES = ([0.1, 0.1, 0.5, 0.5], [0.2, 0.2, 1.001, 0.6], [0.3, 0.3, 0.3, 0.6])


@pytest.fixture(params=["json", "parquet"])
def read(request, tmp_path):
    """Reads the same three rows, of which two have a bad box, from either format."""
    if request.param == "json":
        (tmp_path / "a.png").write_bytes(PNG)
        records = [
            {
                "image": ["a.png"],
                "bboxes": [box],
                "conversations": [
                    {"from": "human", "value": "<image>\nQ"},
                    {"from": "gpt", "value": "<lvr>\n<answer> A </answer>"},
                ],
            }
            for box in BOXES
        ]
        path = tmp_path / "rows.json"
        path.write_text(json.dumps(records))
        return lambda bad_boxes: list(read_lvr_json(path, bad_boxes=bad_boxes))
    path = tmp_path / "rows.parquet"
    rows = [
        verl_row(
            data_source="test",
            prompt="Q<image>",
            images=[PNG],
            answer="A",
            index=index,
            split="train",
            bboxes=[box],
        )
        for index, box in enumerate(BOXES)
    ]
    write_verl_parquet(path, rows)
    return lambda bad_boxes: list(read_verl_parquet(path, bad_boxes))


@pytest.mark.parametrize("rule", [None, BadBoxes()])
def test_refused_by_default(read, rule):
    with pytest.raises(BadBoxError, match=r"row 1: .*bboxes\[0\]: a box lies outside the image"):
        read(rule)


def test_clamped(read):
    bad_boxes = BadBoxes("clamp")
    boxes = [example.boxes[0] for example in read(bad_boxes)]
    assert boxes[0] == tuple(BOXES[0]) and boxes[1] == (0.2, 0.2, 1.0, 0.6)
    assert boxes[2][0] == 0.3 and 0 < boxes[2][2] - 0.3 < 1e-6
    assert (bad_boxes.num_clamped, bad_boxes.num_dropped) == (2, 0)
    assert "2 boxes clamped" in bad_boxes.report() and "row 1" in bad_boxes.report()


def test_dropped(read):
    bad_boxes = BadBoxes("drop")
    assert [example.boxes for example in read(bad_boxes)] == [(tuple(BOXES[0]),)]
    assert (bad_boxes.num_clamped, bad_boxes.num_dropped) == (0, 2)
    assert "2 rows dropped" in bad_boxes.report() and "row 1" in bad_boxes.report()
