"""The entry point of evaluation on the embedded task's files.

Rows are read, reports written, and errors name their setting.
"""

import dataclasses
import io
import json

import pytest
import torch
from hydra import compose, initialize_config_module
from PIL import Image
from rich.console import Console

from grpo_latent.data.embedded import digits
from grpo_latent.data.files import RowKeys
from grpo_latent.errors import ConfigError, DataError
from grpo_latent.eval.benchmarks import load_benchmark
from grpo_latent.eval.benchmarks.presets import lvr_grade
from grpo_latent.eval.decode import Evaluator
from grpo_latent.eval.evaluate import Evaluation
from grpo_latent.eval.prompts import benchmark_prompts, encode_row, read_prompts
from grpo_latent.eval.table import report_table
from grpo_latent.evaluate import (
    benchmark_notes,
    check_only,
    check_values,
    main,
    run,
    with_preset,
)
from grpo_latent.latent.mechanisms import LVR
from grpo_latent.models import tiny
from grpo_latent.models.loading import LatentModel, save_latent_model


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Writes the embedded task's held-out rows and a random model of its architecture.

    The model likes to open spans.
    """
    folder = tmp_path_factory.mktemp("digits")
    for kind in ("read", "sum"):
        rows = digits.to_rows(
            digits.generate(6, stream="heldout", seed=0, kinds=(kind,)), "heldout"
        )
        digits.write_verl_parquet(folder / f"{kind}.parquet", rows)
    model, tokenizer, processor = tiny.tiny_qwen2_5_vl(digits.WORDS)
    ids = tokenizer.get_vocab()
    with (
        torch.no_grad()
    ):  # the final norm's output is roughly along this row, so `start` is the arg-max at first
        probe = processor(text=["<|im_start|> read <|im_end|>"], return_tensors="pt").input_ids
        hidden = model.model(input_ids=probe).last_hidden_state[0, -1]
        model.lm_head.weight[ids["<|lvr_start|>"]] = hidden
    mechanism = LVR.from_tokens(ids, steps=1, max_spans=1)
    save_latent_model(folder / "model", model, tokenizer, processor, mechanism)
    return (
        folder,
        rows,
        LatentModel(model, tokenizer, processor, mechanism, (tokenizer.eos_token_id,)),
    )


def test_prompts_of_the_embedded_task(files):
    folder, rows, loaded = files
    prompts = read_prompts([folder / "sum.parquet"], loaded)
    examples = digits.generate(6, stream="heldout", seed=0, kinds=("sum",))
    assert (
        len(read_prompts([folder / "read.parquet", folder / "sum.parquet"], loaded, max_rows=8))
        == 8
    )
    for index, (prompt, example) in enumerate(zip(prompts, examples, strict=True)):
        assert prompt.ground_truth == example.answer and prompt.where.endswith(f"row {index}")
        # a cell of the 4 x 4 grid is a visual token
        assert prompt.roi == tuple(4 * item.row + item.column for item in example.asked)
        assert int((prompt.prompt_ids == loaded.model.config.image_token_id).sum()) == 16
        assert prompt.extra_info["index"] == index


def test_data_as_others_write_it(files, tmp_path):
    """JSON lines with columns of other names and structs as text give the prompts of parquet."""
    folder, rows, loaded = files
    records = []
    for number, row in enumerate(rows):
        picture = tmp_path / f"{number}.png"
        picture.write_bytes(row["images"][0]["bytes"])
        record = {name: value for name, value in row.items() if name != "images"}
        record |= {"prompt": "not this one", "question": row["prompt"], "pictures": [str(picture)]}
        record["extra_info"] = json.dumps(row["extra_info"])
        records.append(json.dumps(record))
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(records))
    expected = read_prompts([folder / "sum.parquet"], loaded)
    prompts = read_prompts([path], loaded, keys=RowKeys("question", "pictures"))
    for prompt, other in zip(prompts, expected, strict=True):
        assert torch.equal(prompt.prompt_ids, other.prompt_ids) and prompt.roi == other.roi
        assert prompt.images is not None and other.images is not None
        assert torch.equal(prompt.images.pixel_values, other.images.pixel_values)
        assert prompt.ground_truth == other.ground_truth


def test_an_evaluation_reads_the_columns_that_it_is_told(files):
    folder, _, _ = files
    config = config_for(folder, "data.prompt_key=question")
    with pytest.raises(DataError, match=r"columns \['question'\] are missing"):
        run(config)


def test_roi_of_the_second_image_is_offset_and_bad_boxes_are_named(files):
    _, rows, loaded = files
    row = json.loads(json.dumps({k: v for k, v in rows[0].items() if k != "images"}))
    row["images"] = [rows[0]["images"][0], rows[1]["images"][0]]
    row["prompt"] = [{"role": "user", "content": "<image> read red ? <image>"}]
    row["extra_info"] |= {
        "bboxes": [[0.0, 0.0, 0.2, 0.2], [0.3, 0.0, 0.45, 0.2]],
        "bbox_images": [1, 0],
    }
    assert encode_row(row, "rows.parquet row 4", loaded, "4").roi == (16, 1)
    for changes, message in (
        ({"bbox_images": [None, 0]}, "rows.parquet row 4: extra_info.bbox_images"),
        (
            {"bbox_images": [2, 0]},
            r"rows.parquet row 4: extra_info.bbox_images.*\[2, 0\] for 2 boxes, 2 images",
        ),
        (
            {"bboxes": [[0.0, 0.0, 2.0, 0.2], [0, 0, 1, 1]]},
            "rows.parquet row 4: extra_info.bboxes.*outside the image",
        ),
    ):
        with pytest.raises(DataError, match=message):
            encode_row(
                row | {"extra_info": row["extra_info"] | changes},
                "rows.parquet row 4",
                loaded,
                "4",
            )
    with pytest.raises(DataError, match="rows.parquet row 4: extra_info: malformed row"):
        encode_row(row | {"extra_info": "{}"}, "rows.parquet row 4", loaded, "4")


def config_for(folder, *overrides):
    base = [
        f"model.path={folder / 'model'}",
        f"data.val_files={folder / 'read.parquet'}",
        "data.max_response_length=6",
        "reward.custom_reward_function.path=reward/digits.py",
        f"output={folder / 'report.json'}",
    ]
    with initialize_config_module("grpo_latent.config", version_base=None):
        return compose("evaluate", overrides=[*base, *overrides])


def test_entry_point_writes_the_report(files, monkeypatch, request):
    folder, _, _ = files
    monkeypatch.chdir(request.config.rootpath)
    report = run(
        config_for(folder, "latent.visibility=latents_only", "rollout.n=2", "data.max_rows=5")
    )
    text = (folder / "report.json").read_text()
    assert json.loads(text) == json.loads(json.dumps(report))
    assert report["provenance"]["seed"] == report["seed"] and report["provenance"]["processor"]
    assert report["num_prompts"] == 5 and report["latent_config"]["visibility"] == "latents_only"
    assert report["latents"]["frac_rollouts"] > 0 and report["leak"] in (0.0, None)
    assert not list(folder.glob("*.part*")), "no parts are left"
    assert f"[{', '.join(f'{v:.1f}' for v in report['outcomes']['own'])}]" in text


def test_a_check_reads_everything_and_decodes_nothing(files, monkeypatch, capsys, request):
    folder, _, _ = files
    monkeypatch.chdir(request.config.rootpath)
    monkeypatch.setattr(Evaluation, "run", None)
    config = config_for(folder, f"output={folder / 'checked' / 'report.json'}", "rollout.n=2")
    check_only(config)
    said = capsys.readouterr().out
    assert "6 of" in said and "own, sampled" in said and "nothing was evaluated" in said
    assert not (folder / "checked").exists()
    config.reward.custom_reward_function.path = "reward/none.py"
    with pytest.raises(ConfigError, match="reward/none.py"):
        check_only(config)


def test_an_evaluation_does_not_go_on_with_an_edited_reward(files, monkeypatch, tmp_path, request):
    folder, _, _ = files
    reward, code = (
        tmp_path / "mine.py",
        (request.config.rootpath / "reward" / "digits.py").read_text(),
    )
    reward.write_text(code)
    config = config_for(
        folder,
        f"reward.custom_reward_function.path={reward}",
        f"output={tmp_path / 'report.json'}",
    )

    def interrupted(evaluation):
        raise InterruptedError

    monkeypatch.setattr(Evaluation, "run", interrupted)
    for _ in range(2):  # the second one may go on
        with pytest.raises(InterruptedError):
            run(config)
    reward.write_text(code + "# edited\n")
    with pytest.raises(ConfigError, match=r"another one.*\['reward files'\]"):
        run(config)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.path=nowhere", "CheckpointError: nowhere: no such folder"),
        ("ablations=[lobotomy]", "ConfigError: ablations: unknown ablation"),
        (
            "reward.custom_reward_function.path=null",
            "ConfigError: latent.reward.functions: no reward function",
        ),
        ("data.val_files=nowhere.parquet", "DataError: nowhere.parquet"),
        ("model.dtype=int32", "ConfigError: model.dtype"),
        ("rollout.n=-1", "ConfigError: rollout.n: out of range"),
        ("data.max_response_length=0", "ConfigError: data.max_response_length: out of"),
        ("decodings=[{stepps: 4}]", "ConfigError: decodings[0]: unknown key"),
        (
            "decodings=[{temperature: 0.7}]",
            "ConfigError: decodings[0]: sampling settings of a greedy",
        ),
        ("data.max_rows=0", "ConfigError: data.max_rows: out of range"),
        ("verdict.num_resamples=0", "ConfigError: verdict.num_resamples: out of range"),
        ("verdict.primary=lobotomy", "ConfigError: ablations: unknown ablation"),
        (
            "verdict.primary=oracle",
            "ConfigError: verdict.primary: a loss under this ablation need not mean",
        ),
        ("data.benchmark.name=mmvp", "ConfigError: data.benchmark.path: no folder"),
        ("model.plain=true", "ConfigError: model.plain: a plain model has no latents"),
    ],
)
def test_entry_point_prints_typed_errors(files, monkeypatch, capsys, request, override, message):
    folder, _, _ = files
    monkeypatch.chdir(request.config.rootpath)
    assert main(config_for(folder, override)) == 2
    assert message in capsys.readouterr().err


def test_a_benchmark_is_graded_strictly_and_needs_no_reward(files, monkeypatch, tmp_path):
    """The embedded task's rows as a benchmark: the accuracy of its grader."""
    folder, rows, loaded = files
    options = (
        "data.val_files=null",
        "reward.custom_reward_function.path=null",
        "latent.reward.functions=[]",
    )
    benchmark = ("data.benchmark.name=digits", f"data.benchmark.path={folder / 'read.parquet'}")
    report = run(
        config_for(
            folder,
            *options,
            *benchmark,
            "latent.steps=2",
            f"output={tmp_path / 'r.json'}",
            "verdict.chance=0.1",
        )
    )
    items = load_benchmark("digits", folder / "read.parquet")
    prompts = benchmark_prompts(items, loaded)
    e = Evaluator(dataclasses.replace(loaded, mechanism=loaded.mechanism.replace(steps=2)), 6)
    decode = loaded.tokenizer.decode
    expected = [
        item.grade(decode(t.text_ids)).correct
        for item, t in zip(items, e.greedy(prompts), strict=True)
    ]
    assert report["outcomes"]["own"] == expected and report["data"] == [
        f"digits {folder / 'read.parquet'}"
    ]
    assert report["chance"] == 0.1 and [p["row_id"] for p in report["prompts"]] == [
        item.item_id for item in items
    ]


def preset_config(folder, *overrides):
    """The shipped config, in which `data.max_response_length` is for the user to set."""
    given = ["model.path=m", f"data.benchmark.path={folder}", *overrides]
    with initialize_config_module("grpo_latent.config", version_base=None):
        return compose("evaluate", overrides=given)


def test_a_preset_brings_what_its_paper_decodes(tmp_path):
    """Positions and lengths of a span, unless the user says something else; and what to compare."""
    asked = ("data.benchmark.name=mmvp", "data.benchmark.preset=lvr")
    config = with_preset(preset_config(tmp_path, *asked))
    check_values(config)
    assert config.data.max_response_length == 512
    assert config.decodings == [{"steps": 4}, {"steps": 8}, {"steps": 16}]
    compare, labels = benchmark_notes(config)["notes"]
    assert "71.67 on MMVP is per question (215 of 300): compare published_accuracy" in compare
    assert "rows 99/100" in labels and "as published here" in labels
    own = (
        "data.max_response_length=64",
        "decodings=[{steps: 2}]",
        "data.benchmark.labels=corrected",
    )
    config = with_preset(preset_config(tmp_path, *asked, *own))
    assert config.data.max_response_length == 64 and config.decodings == [{"steps": 2}]
    _, positions, labels = benchmark_notes(config)["notes"]
    assert "decodes 512 positions, here data.max_response_length=64" in positions
    assert "not comparable with published numbers" in labels
    for wrong, message in (
        (("data.benchmark.preset=lvrr",), "unknown preset"),
        (("data.benchmark.labels=right", "data.max_response_length=4"), "data.benchmark.labels"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_values(with_preset(preset_config(tmp_path, "data.benchmark.name=mmvp", *wrong)))


def test_an_evaluation_under_a_preset(files, tmp_path):
    """LVR's V*: three lengths of a span, each with the paper's number beside the strict one."""
    folder, _, loaded = files
    picture = tmp_path / "direct_attributes" / "a.png"
    picture.parent.mkdir()
    Image.new("RGB", (56, 56), "red").save(picture)
    text = "read ?\n(A) red\n(B) blue\nAnswer with the option's letter from the given choices directly."
    row = {"image": "direct_attributes/a.png", "text": text, "category": "direct_attributes"}
    lines = [
        json.dumps(row | {"label": letter, "question_id": i}) for i, letter in enumerate("AB")
    ]
    (tmp_path / "test_questions.jsonl").write_text("\n".join(lines))
    config = config_for(
        folder,
        "data.benchmark.name=vstar",
        f"data.benchmark.path={tmp_path}",
        "data.benchmark.preset=lvr",
        "ablations=[zero]",
        "leak_prompts=0",
        f"output={tmp_path / 'report.json'}",
    )
    report = run(config)
    assert set(report["decodings"]) == {"steps=4", "steps=8", "steps=16"}
    items = load_benchmark("vstar", tmp_path, preset="lvr")
    prompts = benchmark_prompts(items, loaded)
    e = Evaluator(dataclasses.replace(loaded, mechanism=loaded.mechanism.replace(steps=4)), 6)
    texts = [loaded.tokenizer.decode(t.token_ids) for t in e.greedy(prompts)]
    assert any("<|lvr|>" in text for text in texts), "the authors read the placeholders, too"
    counted = [lvr_grade(text, item) for text, item in zip(texts, items, strict=True)]
    assert report["decodings"]["steps=4"]["published_accuracy"] == sum(counted) / 2
    assert report["benchmark"]["preset"] == "lvr"
    assert report["data"] == [f"vstar {tmp_path}, preset lvr"]
    shown = io.StringIO()
    Console(file=shown, width=110).print(report_table(report))
    assert "as the paper counts" in shown.getvalue() and "note: LVR's V*" in shown.getvalue()
