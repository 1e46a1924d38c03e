"""What a harness gets of a completion: text without latents, tags or placeholders, in full length."""

import pytest
import torch
from harness_cases import NEW_TOKENS, make_questions
from PIL import Image

from grpo_latent.data.embedded import digits
from grpo_latent.data.image_refs import ImageRef
from grpo_latent.errors import ConfigError, DataError
from grpo_latent.harnesses.answers import (
    MIN_NEW_TOKENS,
    Answerer,
    Question,
    bare_answer,
    read_content,
)
from grpo_latent.latent.mechanisms import ILVR
from grpo_latent.models import tiny
from grpo_latent.models.loading import save_latent_model


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return make_questions(tmp_path_factory.mktemp("harness"))


def asked(questions):
    return [
        Question(
            ({"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]},),
            (ImageRef("", data=image).open(),),
        )
        for text, image in zip(questions.texts, questions.images, strict=True)
    ]


def test_answers_are_our_own_engines(questions):
    answerer = Answerer(str(questions.folder / "model"), min_new_tokens=NEW_TOKENS)
    answers = answerer(asked(questions), 1)
    assert [answer.text for answer in answers] == questions.said
    assert len(set(questions.said)) > 1 and 0 < questions.accuracy < 1
    assert {answer.num_tokens for answer in answers} == {NEW_TOKENS}


def test_a_bound_that_latents_would_fill_is_raised_and_told_once(questions, capsys):
    """lmms-eval's max_new_tokens: 16, and a bound that leaves no room for a word at all."""
    answerer = Answerer(str(questions.folder / "model"), min_new_tokens=NEW_TOKENS)
    one = asked(questions)[:1]
    for _ in range(2):
        assert answerer(one, NEW_TOKENS - 1)[0].text == questions.said[0]
    said = capsys.readouterr().err
    assert said.count(f"the task allows {NEW_TOKENS - 1} new tokens") == 1
    assert answerer(one, NEW_TOKENS + 2)[0].num_tokens == NEW_TOKENS + 2
    assert capsys.readouterr().err == ""
    cut = Answerer(str(questions.folder / "model"), min_new_tokens=1)
    assert cut(one, NEW_TOKENS - 1)[0].text == "", "what would be without it"
    assert Answerer(str(questions.folder / "model")).min_new_tokens == MIN_NEW_TOKENS == 512


@pytest.mark.parametrize("bound", [0, -1, 2.0, "16", True])
def test_a_bound_that_is_none(questions, bound):
    with pytest.raises(ConfigError, match="min_new_tokens: no room for an answer"):
        Answerer(str(questions.folder / "model"), min_new_tokens=bound)


@pytest.mark.parametrize(
    ("text", "only", "full"),
    [
        ("<answer>A</answer>", "A", "A"),
        ("It is red.\n<answer> B </answer> ", "B", "It is red.\n B"),
        ("A", "A", "A"),
        (" two  spaces ", "two  spaces", "two  spaces"),
        ("<answer>A</answer> or <answer>B</answer>", "A or B", "A or B"),  # none is the answer
        ("so <answer> A", "so A", "so A"),  # cut off
        ("", "", ""),
    ],
)
def test_answers_leave_without_tags(text, only, full):
    assert bare_answer(text) == only and bare_answer(text, answer_only=False) == full


def test_placeholders_do_not_stay_in_the_text(tmp_path):
    """Tokens that were added as ordinary ones, which `skip_special_tokens` does not know."""
    tokens = ("<|skila|>", "<|sketch_start|>", "<|sketch_end|>")
    model, tokenizer, processor = tiny.tiny_qwen2_5_vl(digits.WORDS, latent_tokens=())
    tokenizer.add_tokens(list(tokens))
    processor.tokenizer = tokenizer
    model.resize_token_embeddings(len(tokenizer))
    ids = tokenizer.get_vocab()
    with torch.no_grad():
        probe = processor(text=["<|im_start|> read"], return_tensors="pt").input_ids
        common = model.model(input_ids=probe).last_hidden_state[0].mean(0)
        model.lm_head.weight.zero_()
        model.lm_head.weight[ids["<|sketch_start|>"]] = 100 * common
        model.lm_head.weight[ids["red"]] = 10 * common
    roles = dict(zip(("latent_token", "start_token", "end_token"), tokens, strict=True))
    mechanism = ILVR.from_tokens(ids, steps=2, max_spans=1, exit="steps", **roles)
    save_latent_model(tmp_path, model, tokenizer, processor, mechanism)
    answerer = Answerer(str(tmp_path), min_new_tokens=5)
    question = Question(({"role": "user", "content": [{"type": "text", "text": "read"}]},), ())
    ids_of_text = answerer.llm.chat([question.messages], [()])[0][0].token_ids[:5]
    decoded = answerer.llm.tokenizer.decode(ids_of_text, skip_special_tokens=True)
    assert all(token in decoded for token in tokens), "the tokenizer alone leaves them"
    assert answerer([question], 5)[0].text == "red"


def test_a_question_without_its_image_is_refused(questions):
    answerer = Answerer(str(questions.folder / "model"), min_new_tokens=NEW_TOKENS)
    with pytest.raises(DataError, match="images do not match the prompt"):
        answerer([Question(asked(questions)[0].messages, ())], 1)


def test_content_of_a_harness_in_its_order(tmp_path):
    picture = Image.new("RGB", (2, 3), "red")
    picture.save(tmp_path / "a.png")
    parts = [
        {"type": "image", "url": picture},
        {"type": "text", "text": "and"},
        {"type": "image", "url": str(tmp_path / "a.png")},
    ]
    content, images = read_content(parts, "mmvp row 1", "text", "url")
    assert [part["type"] for part in content] == ["image", "text", "image"]
    assert content[1]["text"] == "and"
    assert images[0] is picture and images[1].tobytes() == picture.tobytes()
    for wrong, what in (
        ({"type": "video", "url": "a"}, "video"),
        ({"type": "image", "url": 3}, "int"),
    ):
        with pytest.raises(DataError, match=f"mmvp row 1.*got {what}"):
            read_content([wrong], "mmvp row 1", "text", "url")
