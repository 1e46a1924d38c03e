"""Run by lmms-eval's own Python (`test_lmms_eval.py`): our model against its real classes."""

import pytest
from lmms_eval.models import get_model
from lmms_eval.models.registry_v2 import ModelRegistryV2
from PIL import Image

from grpo_latent.errors import ConfigError, DataError
from grpo_latent.harnesses.lmms_eval_entry import manifest
from grpo_latent.harnesses.lmms_eval_model import GrpoLatent, question_of, sampling_of


def test_found_by_its_entry_point():
    registry = ModelRegistryV2()
    registry.load_entrypoint_manifests()
    assert registry.get_manifest("grpo_latent") == manifest()
    assert get_model("grpo_latent") is GrpoLatent and not GrpoLatent.is_simple


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ({}, (4096, 0.0, 1.0, -1)),
        (
            {"max_new_tokens": 16, "temperature": 0, "top_p": 0.5, "until": ["\n"]},
            (16, 0.0, 1.0, -1),
        ),
        ({"temperature": 0.7, "top_p": None, "top_k": 5}, (4096, 0.7, 1.0, 5)),
        ({"temperature": 0.7, "do_sample": False, "num_beams": 1}, (4096, 0.0, 1.0, -1)),
    ],
)
def test_generation_kwargs(given, read):
    assert sampling_of(given) == read


def test_beam_search_is_refused():
    with pytest.raises(ConfigError, match="generation_kwargs.num_beams.*beam search"):
        sampling_of({"num_beams": 3})


def test_messages_in_their_order(tmp_path):
    Image.new("RGB", (3, 2), "red").save(tmp_path / "a.png")
    content = [
        {"type": "text", "text": "first"},
        {"type": "image", "url": Image.new("RGB", (4, 5))},
        {"type": "image", "url": str(tmp_path / "a.png")},
    ]
    system = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    question = question_of([system, {"role": "user", "content": content}], "row 0")
    assert [message["role"] for message in question.messages] == ["system", "user"]
    assert [part["type"] for part in question.messages[1]["content"]] == ["text", "image", "image"]
    assert [image.size for image in question.images] == [(4, 5), (3, 2)]
    for part, message in (
        ({"type": "video", "url": "a.mp4"}, "row 0: a question that .*; got video"),
        ({"type": "image", "url": 7}, "row 0: not an image; got int"),
        ({"type": "image", "url": "nowhere.png"}, "row 0.*no such image file"),
    ):
        with pytest.raises(DataError, match=message):
            question_of([{"role": "user", "content": [part]}], "row 0")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": "auto"}, "batch_size: not a batch size"),
        ({"batch_size": 0}, "batch_size: not a batch size"),
        ({"stepps": 4}, "--model_args: unknown argument.*stepps.*min_new_tokens"),
    ],
)
def test_model_args_are_checked_before_the_checkpoint_is_read(settings, message):
    with pytest.raises(ConfigError, match=message):
        GrpoLatent("nowhere", **settings)


@pytest.mark.parametrize("kind", ["loglikelihood", "generate_until_multi_round"])
def test_tasks_of_another_kind_are_refused(kind):
    model = GrpoLatent.__new__(GrpoLatent)
    with pytest.raises(ConfigError, match=f"--tasks.*{kind}"):
        getattr(model, kind)([])
