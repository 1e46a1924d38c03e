"""Run by VLMEvalKit's own Python (`test_vlmevalkit.py`): our classes against its real ones."""

import pandas as pd
import pytest
import vlmeval.api
import vlmeval.vlm
from PIL import Image
from vlmeval.api import LMDeployAPI
from vlmeval.utils.matching_util import can_infer

from grpo_latent.errors import DataError
from grpo_latent.harnesses.answers import bare_answer
from grpo_latent.harnesses.vlmevalkit import GrpoLatent, GrpoLatentServed, question_of, register


def test_its_parser_does_not_know_answer_tags():
    """Why answers leave without them; with spaces inside it reads the letter by chance."""
    choices = {"A": "left", "B": "right"}
    assert can_infer("<answer>A</answer>", dict(choices)) is False
    assert can_infer(bare_answer("<answer>A</answer>"), dict(choices)) == "A"
    said = "The bird is on the right. <answer>A</answer>"
    assert can_infer(said, dict(choices)) is False, "a judge would be asked"
    assert can_infer(bare_answer(said), dict(choices)) == "A"


def test_both_classes_are_found_by_their_names():
    register()
    assert vlmeval.vlm.GrpoLatent is GrpoLatent
    assert vlmeval.api.GrpoLatentServed is GrpoLatentServed


def test_served_answers_leave_without_tags(monkeypatch):
    """Whatever VLMEvalKit's OpenAI-compatible class got of the server."""
    answers = iter([(0, "It is. <answer> B </answer>", "log"), (-1, "<answer> failed", "log")])
    monkeypatch.setattr(LMDeployAPI, "generate_inner", lambda self, inputs, **_: next(answers))
    served = GrpoLatentServed.__new__(GrpoLatentServed)
    assert served.generate_inner([]) == (0, "B", "log")
    assert served.generate_inner([]) == (-1, "<answer> failed", "log")


def test_messages_in_their_order(tmp_path):
    Image.new("RGB", (3, 2), "red").save(tmp_path / "a.png")
    message = [
        {"type": "image", "value": str(tmp_path / "a.png")},
        {"type": "text", "value": "between"},
        {"type": "image", "value": str(tmp_path / "a.png")},
    ]
    question = question_of(message, "MMVP")
    (user,) = question.messages
    assert [part["type"] for part in user["content"]] == ["image", "text", "image"]
    assert [image.size for image in question.images] == [(3, 2), (3, 2)] and GrpoLatent.INTERLEAVE
    with pytest.raises(DataError, match="MMVP: a question that .*; got video"):
        question_of([{"type": "video", "value": "a.mp4"}], "MMVP")


def test_a_template_asks_with_the_columns_of_a_row():
    model = GrpoLatent.__new__(GrpoLatent)
    model.template = "{question}\nA. {A}\nB. {B}"
    model.dump_image_func = lambda line: ["one.png", "two.png"]
    row = pd.Series({"index": 3, "question": "Which?", "A": "x", "B": "y"})
    assert model.use_custom_prompt("MMVP")
    assert model.build_prompt(row, "MMVP") == [
        {"type": "image", "value": "one.png"},
        {"type": "image", "value": "two.png"},
        {"type": "text", "value": "Which?\nA. x\nB. y"},
    ]
    model.template = "{question} {C}"
    with pytest.raises(DataError, match="MMVP row 3: the template asks for a column.*'C'"):
        model.build_prompt(row, "MMVP")
    model.template = None
    assert not model.use_custom_prompt("MMVP")
