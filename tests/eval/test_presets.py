"""Presets of papers: prompts written out by hand, answers counted as the authors' code counts them.

Facts are of their public evaluation scripts; their files are not at hand.
"""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from benchmark_cases import (
    png,
    write_blink,
    write_comt,
    write_m3cot,
    write_mmvp,
    write_scienceqa,
    write_table,
    write_vstar,
)

from grpo_latent.errors import ConfigError, DataError
from grpo_latent.eval.accuracies import decoding_report
from grpo_latent.eval.benchmarks import (
    PRESETS,
    BenchmarkItem,
    Preset,
    PublishedGrade,
    find_preset,
    load_benchmark,
)
from grpo_latent.eval.benchmarks.presets import ilvr_grade, lvr_grade, m3cot_grade, scienceqa_grade
from grpo_latent.eval.decode import GREEDY
from grpo_latent.eval.prompts import EvalPrompt
from grpo_latent.eval.scoring import GradeScorer, Outcome
from grpo_latent.eval.verdict import VerdictSettings
from grpo_latent.trajectory import PositionKind as K
from grpo_latent.trajectory import Trajectory

DIRECTLY = "Answer with the option's letter from the given choices directly."


def prompt_of(item):
    *images, text = item.messages[0]["content"]
    assert images == [{"type": "image"}] * len(item.images)
    return text["text"]


def test_lvrs_prompts(tmp_path):
    for write in (write_mmvp, write_vstar, write_blink):
        (tmp_path / write.__name__).mkdir()
        write(tmp_path / write.__name__)
    item = load_benchmark("mmvp", tmp_path / "write_mmvp", preset="lvr")[0]
    assert prompt_of(item) == f"Is it open?\nOptions:\nA. Open B. Closed\n{DIRECTLY}"
    item = load_benchmark("vstar", tmp_path / "write_vstar", preset="lvr")[0]
    asked = f"What is the colour?\n(A) red\n(B) dark red\n{DIRECTLY}"
    assert prompt_of(item) == f"{asked}\n{DIRECTLY}", "said twice: the file's text ends in it"
    item = load_benchmark("blink", tmp_path / "write_blink", preset="lvr")[0]
    assert prompt_of(item) == f"How many?\nOptions:\nA. 1\nB. 2\nC. 3\n\n{DIRECTLY}"
    assert len(item.images) == 2


def test_lvrs_blink_is_five_subsets(tmp_path):
    """Another subset is left out, or refused where nothing else is there."""
    write_blink(tmp_path)
    write_blink(tmp_path / "more", sub_task="Art_Style", idx="val_Art_1")
    (tmp_path / "more" / "Jigsaw").rename(tmp_path / "Art_Style")
    shutil.rmtree(tmp_path / "more")
    loaded = load_benchmark("blink", tmp_path, preset="lvr")
    assert {item.category for item in loaded} == {"Counting", "Jigsaw"}
    with pytest.raises(DataError, match="no rows that preset lvr asks.*Art_Style.*IQ_Test"):
        load_benchmark("blink", tmp_path, "Art_Style", preset="lvr")


def test_ivt_lrs_prompts(tmp_path):
    """Braces and all; M3CoT's pictures at 280 x 280, ScienceQA's questions with a picture only."""
    for write in (write_m3cot, write_scienceqa):
        (tmp_path / write.__name__).mkdir()
        write(tmp_path / write.__name__)
    (item,) = load_benchmark("m3cot", tmp_path / "write_m3cot", preset="ivt_lr")
    assert prompt_of(item) == "[Question]:{Which?}\n[Options]:\nA.{north}\nB.{south}\nAnswer:"
    assert item.images[0].open().size == (280, 280)
    assert item.images[0].decoded_size() == (280, 280)
    (item,) = load_benchmark("scienceqa", tmp_path / "write_scienceqa", preset="ivt_lr")
    asked = "[Question]:{Which conducts?}\n[Options]:\n(A).{wood}\n(B).{iron}\nAnswer:"
    assert prompt_of(item) == asked and item.images[0].open().size == (4, 3)


def test_ilvrs_prompt_is_the_files(tmp_path):
    write_comt(tmp_path)
    (item,) = load_benchmark("comt", tmp_path, preset="ilvr")
    assert prompt_of(item) == "Which is deleted? A. red B. blue"


def test_what_a_paper_did_not_publish_is_refused(tmp_path):
    for preset, name in (("ilvr", "mmvp"), ("lvr", "hrbench"), ("ivt_lr", "vstar")):
        with pytest.raises(ConfigError, match=f"preset {preset} has no form.*got {name}"):
            load_benchmark(name, tmp_path / "nowhere", preset=preset)
    with pytest.raises(ConfigError, match="unknown preset; got lrv.*ilvr"):
        load_benchmark("mmvp", tmp_path, preset="lrv")


OWN = """
from grpo_latent.eval.benchmarks import Benchmark, BenchmarkItem, Preset
from grpo_latent.eval.benchmarks.presets import Form
from grpo_latent.eval.benchmarks.protocol import PublishedGrade

class Sums(Benchmark):
    def __init__(self):
        super().__init__("own_sums", "a pencil", ("sums.jsonl",), ("n",), parse=self.item)

    def item(self, row, where, file):
        n = str(row["n"])
        return BenchmarkItem("own_sums", n, n, "", (), (), (), n, "How many?")

MINE = Preset("mine", {"own_sums": Form(lambda item: f"Say: {item.question}",
              PublishedGrade(lambda text, item: item.answer in text), "a note")}, 8)
"""


def test_a_users_own_class_and_preset_by_their_paths(tmp_path, monkeypatch):
    (tmp_path / "own_preset.py").write_text(OWN)
    (tmp_path / "sums.jsonl").write_text('{"n": 1}\n{"n": 2}')
    monkeypatch.syspath_prepend(tmp_path)
    for _ in range(2):  # made once, however often it is asked for
        items = load_benchmark("own_preset:Sums", tmp_path, preset="own_preset:MINE")
    assert [prompt_of(item) for item in items] == ["Say: How many?"] * 2
    assert items[1].published.grade("2, I think", items[1])
    assert isinstance(find_preset("own_preset:MINE"), Preset)
    with pytest.raises(ConfigError, match="data.benchmark.preset: not a preset.*Sums"):
        find_preset("own_preset:Sums")


def item(answer, options=("x", "y", "z")):
    return BenchmarkItem("b", "0", "0", "", (), (), options, answer)


@pytest.mark.parametrize(
    ("text", "counted"),
    [
        ("<|lvr_start|><|lvr|><|lvr_end|><answer> B </answer><|im_end|>", True),
        ("<answer>A</answer> no: <answer>B</answer>", True),  # the last one
        ("<answer>Bored", True),  # its first character
        ("B<|im_end|>", True),
        ("<|lvr_start|><|lvr|><|lvr_end|>B", False),  # without a tag the text begins with "<"
        ("<answer>b</answer>", False),
        ("<answer>(B)</answer>", False),
        ("<answer></answer>", False),
        ("", False),
    ],
)
def test_lvrs_count(text, counted):
    assert lvr_grade(text, item("B")) is counted
    assert PRESETS["lvr"].forms["mmvp"].grade.sees_special_tokens


@pytest.mark.parametrize(
    ("text", "answer", "counted"),
    [
        ("First this.\nThe final answer is: B", "B", True),
        ("The answer: C\nand so on", "C", True),
        ("The answer: C.", "C", False),
        ("final answer: A, so answer: B", "A", False),  # "A, so answer: B" is no A
        ("Yes, it is", "A", True),  # the only one of yes, no, true, false, a, b; A is yes
        ("yes or no", "A", False),
        ("B", "no", True),
        ("C", "C", True),
        ("c", "C", False),
    ],
)
def test_ilvrs_count(text, answer, counted):
    assert ilvr_grade(text, item(answer)) is counted


@pytest.mark.parametrize(
    ("text", "counted"),
    [
        ("Therefore, the answer is B", True),
        ("the answer is A. No, the answer is\nb", True),  # any of them
        ("Because", True),  # the prompt ends in "Answer:", so its first letter is one
        ("  b", True),
        ("(B)", False),
        ("Cats. answer: B", True),
        ("It is B", False),
        ("", False),
    ],
)
def test_ivt_lrs_count_on_m3cot(text, counted):
    assert m3cot_grade(text, item("B")) is counted


@pytest.mark.parametrize(
    ("text", "counted"),
    [
        ("Therefore, the answer is 1", True),  # an index
        ("the answer is A. The answer is 1", True),  # a digit goes before a letter
        ("The answer is B", True),
        ("the answer is A, the answer is B", False),  # the first one
        ("answer is: b", True),
        ("B", False),
    ],
)
def test_ivt_lrs_count_on_scienceqa(text, counted):
    assert scienceqa_grade(text, item("B")) is counted


def test_report_has_the_papers_number_beside_ours(tmp_path):
    """MMVP by hand: four rows, two pairs; the authors count a row that our grader does not."""
    write_mmvp(tmp_path)
    items = load_benchmark("mmvp", tmp_path, preset="lvr")
    prompts = [
        EvalPrompt(torch.ones(1), None, "mmvp", i.answer, "", i.item_id, item=i) for i in items
    ]
    strict, counted = (1.0, 1.0, 0.0, 1.0), (1.0, 1.0, 1.0, 0.0)
    groups = [[Outcome(s, c)] for s, c in zip(strict, counted, strict=True)]
    report = decoding_report(prompts, GREEDY, groups, VerdictSettings(num_resamples=10))
    assert (report["row_accuracy"], report["pair_accuracy"]) == (0.75, 0.5)
    assert report["published_accuracy"] == 0.75 and "published_by_category" not in report
    groups[3] = [Outcome(1.0, 1.0)]
    report = decoding_report(prompts, GREEDY, groups, VerdictSettings(num_resamples=10))
    assert (report["row_accuracy"], report["published_accuracy"]) == (0.75, 1.0)
    plain = load_benchmark("mmvp", tmp_path)
    prompts = [
        EvalPrompt(torch.ones(1), None, "mmvp", i.answer, "", i.item_id, item=i) for i in plain
    ]
    report = decoding_report(prompts, GREEDY, groups, VerdictSettings(num_resamples=10))
    assert "published_accuracy" not in report


WORDS = ["<|lvr_start|>", "<|lvr|>", "<|lvr_end|>", "<eos>", "B", "<answer>", "</answer>", "Bored"]


@pytest.mark.parametrize(
    ("grade", "words", "strict", "counted"),
    [
        (lvr_grade, "<answer> Bored </answer> <eos>", 0.0, 1.0),
        (lvr_grade, "<|lvr_start|> <|lvr|> <|lvr_end|> B <eos>", 1.0, 0.0),  # it begins with "<"
        (m3cot_grade, "<|lvr_start|> <|lvr|> <|lvr_end|> B <eos>", 1.0, 1.0),
        (m3cot_grade, "Bored", 0.0, 1.0),
    ],
)
def test_authors_read_the_text_that_their_code_decodes(grade, words, strict, counted):
    """LVR's with all special tokens, IVT-LR's without them."""
    kinds = {"<|lvr_start|>": K.START, "<|lvr|>": K.LATENT, "<|lvr_end|>": K.FORCED}
    ids = torch.tensor([WORDS.index(word) for word in words.split()])
    of_position = torch.tensor([int(kinds.get(word, K.TEXT)) for word in words.split()])
    latents = torch.zeros(int((of_position == K.LATENT).sum()), 2)
    zeros = torch.zeros(len(ids))
    trajectory = Trajectory(torch.ones(1).long(), ids, of_position, latents, zeros, zeros, "eos")
    tokenizer = SimpleNamespace(decode=lambda ids, **_: " ".join(WORDS[i] for i in ids))
    scorer = GradeScorer(SimpleNamespace(eos_ids=(3,), tokenizer=tokenizer))
    published = PublishedGrade(grade, sees_special_tokens=grade is lvr_grade)
    asked = replace(item("B"), published=published)
    prompt = EvalPrompt(torch.ones(1), None, "b", "B", "", "0", item=asked)
    (outcome,) = scorer([prompt], [trajectory])
    assert (outcome.correct, outcome.score) == (strict, counted)


def test_papers_numbers_by_category(tmp_path):
    write_blink(tmp_path)
    items = load_benchmark("blink", tmp_path, preset="lvr")
    prompts = [
        EvalPrompt(torch.ones(1), None, "b", i.answer, "", i.item_id, item=i) for i in items
    ]
    groups = [[Outcome(0.0, 1.0)], [Outcome(0.0, 0.0)]]
    report = decoding_report(prompts, GREEDY, groups, VerdictSettings(num_resamples=10))
    assert report["published_by_category"] == {"Counting": 1.0, "Jigsaw": 0.0}
    assert report["published_accuracy"] == 0.5 and report["accuracy"] == 0.0


def write_swapped(root, answers):
    """Rows of the pairs whose labels are disputed, and one beside them."""
    (root / "MMVP Images").mkdir()
    rows = []
    for index, answer in answers.items():
        (root / "MMVP Images" / f"{index}.jpg").write_bytes(png())
        row = {"Index": index, "Question": "?", "Options": "(a) Long (b) Short"}
        rows.append(row | {"Correct Answer": answer})
    write_table(root / "Questions.csv", rows)


def test_mmvps_corrected_labels(tmp_path):
    """As Questions.csv has them, turned round, and twice: lmms-eval's copy is right already."""
    published = {97: "(a)", 98: "(b)", 99: "(a)", 100: "(b)", 279: "(a)", 280: "(b)"}
    right = dict(zip(published, "ABBABA", strict=True))
    write_swapped(tmp_path, published)
    items = load_benchmark("mmvp", tmp_path)
    assert [item.answer for item in items] == list("ABABAB")
    items = load_benchmark("mmvp", tmp_path, labels="corrected")
    assert {int(item.item_id): item.answer for item in items} == right
    assert items[2].grade("(b)").correct and not items[2].grade("(a)").correct
    (tmp_path / "copy").mkdir()
    write_swapped(
        tmp_path / "copy", {index: f"({letter.lower()})" for index, letter in right.items()}
    )
    items = load_benchmark("mmvp", tmp_path / "copy", labels="corrected")
    assert {int(item.item_id): item.answer for item in items} == right
    with pytest.raises(ConfigError, match="data.benchmark.labels.*corrected for vstar"):
        load_benchmark("vstar", tmp_path, labels="corrected")


def test_a_json_list_is_a_table(tmp_path):
    """And a record in it that is none is a row without columns."""
    (tmp_path / "MME-RealWorld").mkdir()
    (tmp_path / "MME-RealWorld" / "a.json").write_text(json.dumps(["not a record"]))
    with pytest.raises(DataError, match="row 0: columns"):
        load_benchmark("mme_realworld", tmp_path)


def test_images_only_refuses_a_file_without_images(tmp_path):
    write_m3cot(tmp_path, image=None)
    with pytest.raises(DataError, match="no rows that preset ivt_lr asks.*rows with an image"):
        load_benchmark("m3cot", tmp_path, preset="ivt_lr")
