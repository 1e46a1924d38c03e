"""One tiny checkpoint and eighteen questions, in the files of three evaluations."""

import base64
import csv
import os
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hydra import compose, initialize_config_module

from grpo_latent.data.embedded import digits
from grpo_latent.data.image_refs import ImageRef
from grpo_latent.data.rows import write_verl_parquet
from grpo_latent.evaluate import run as evaluate
from grpo_latent.latent.mechanisms import LVR
from grpo_latent.models import tiny
from grpo_latent.models.loading import save_latent_model
from grpo_latent.rollout.llm import LatentLLM
from grpo_latent.rollout.protocol import SamplingParams

ROOT = Path(__file__).parents[2]
HARNESSES = Path(os.environ.get("GRPO_LATENT_HARNESSES", ROOT / ".venv-harnesses"))
NEW_TOKENS = 5  # start, two latents, end, and a digit
LETTERS = "ABCDEFGHIJ"


def python_of(harness):
    """The harness's own Python; skips where `make harnesses` has not made it."""
    python = HARNESSES / harness / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no environment of {harness} ({python}): make harnesses")
    return python


def needs_vllm(python):
    """Skips where a harness's environment has no vLLM: it takes that of .venv."""
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    if subprocess.run([python, "-c", code]).returncode:
        pytest.skip(f"no vLLM for {python}: make vllm, then make harnesses")


def run(command, folder, **variables):
    """Runs a command of a harness, offline and with caches of its own; returns what it prints."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        **variables,
    }
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@contextmanager
def served(model, folder, *flags):
    """The address of `grpo_latent.serve`, by this Python; it is stopped by a SIGTERM."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "grpo_latent.serve", str(model), "--port", str(port), *flags]
    variables = {"PYTHONPATH": str(ROOT), "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
    path = folder / "server.log"
    with open(path, "w") as log:
        process = subprocess.Popen(
            command, env=os.environ | variables, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        for _ in range(1200):
            assert process.poll() is None, path.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.5)
        else:
            raise AssertionError(path.read_text()[-3000:])
        yield f"http://127.0.0.1:{port}/v1/chat/completions"
    finally:
        process.terminate()
        process.wait(timeout=60)


@dataclass(frozen=True)
class Questions:
    """What all evaluations ask.

    Attributes:
        folder: holds `model` and `rows.parquet`.
        texts, images, truths: of the questions, in order.
        said: what the model answers each, by our own engine.
    """

    folder: Path
    texts: list[str]
    images: list[bytes]
    truths: list[str]
    said: list[str]

    @property
    def accuracy(self):
        return sum(a == b for a, b in zip(self.said, self.truths, strict=True)) / len(self.said)


def write_model(folder):
    """A random model that opens a span and then says a digit, which depends on the question."""
    # heads that vLLM's CPU kernels take; of the seeds tried, most give one digit to all questions
    sizes = tiny.TinySizes(hidden=64, layers=4)
    model, tokenizer, processor = tiny.tiny_qwen2_5_vl(digits.WORDS, sizes, seed=2)
    ids = tokenizer.get_vocab()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        probe = processor(text=["<|im_start|> read <|im_end|>"], return_tensors="pt").input_ids
        common = model.model(input_ids=probe).last_hidden_state[0].mean(0)
        common /= common.norm()
        model.lm_head.weight.zero_()
        model.lm_head.weight[ids["<|lvr_start|>"]] = 100 * common
        for digit in range(10):
            row = torch.randn(len(common), generator=draw)
            # along `common` all states are alike; what is left depends on the input
            row -= (row @ common) * common
            model.lm_head.weight[ids[str(digit)]] = 10 * common + 5 * row
    mechanism = LVR.from_tokens(ids, steps=2, max_spans=1)
    save_latent_model(folder, model, tokenizer, processor, mechanism)


def make_questions(folder, asked=str, seen=bytes):
    """Questions to which the model's answers differ.

    Args:
        asked: from a question's text to what a harness makes of it.
        seen: from an image's file to the one that the model gets.
    """
    write_model(folder / "model")
    rows = digits.to_rows(
        digits.generate(18, stream="heldout", seed=0, kinds=("read",)), "heldout"
    )
    texts = [row["prompt"][0]["content"].replace("<image>", "").strip() for row in rows]
    images = [row["images"][0]["bytes"] for row in rows]
    llm = LatentLLM(folder / "model")
    pictures = [[ImageRef("", data=seen(image)).open()] for image in images]
    prompts = [f"<image>{asked(text)}" for text in texts]
    groups = llm.generate(prompts, pictures, SamplingParams(NEW_TOKENS, 0.0))
    said = [llm.text(group[0]).strip() for group in groups]
    # every third label is another digit, so that accuracy is neither 0 nor 1
    truths = [str((int(answer) + (number % 3 == 0)) % 10) for number, answer in enumerate(said)]
    for row, prompt, image, truth in zip(rows, prompts, images, truths, strict=True):
        row["prompt"] = [{"role": "user", "content": prompt}]
        row["images"] = [{"bytes": seen(image)}]
        row["reward_model"] = row["reward_model"] | {"ground_truth": truth}
    write_verl_parquet(folder / "rows.parquet", rows)
    return Questions(folder, texts, images, truths, said)


UTILS = """
import io
from PIL import Image

def visual(doc):
    return [Image.open(io.BytesIO(doc["image"]["bytes"])).convert("RGB")]

def text(doc):
    return doc["question"]

def target(doc):
    return doc["answer"]

def results(doc, results):
    return {"exact": float(results[0].strip() == doc["answer"])}
"""
TASK = """
task: tiny_digits
dataset_path: parquet
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
doc_to_target: !function utils.target
process_results: !function utils.results
generation_kwargs: {{max_new_tokens: 1, temperature: 0, do_sample: false}}
metric_list:
  - {{metric: exact, aggregation: mean, higher_is_better: true}}
"""


def write_lmms_task(questions, folder):
    folder.mkdir()
    rows = [
        {"image": {"bytes": image, "path": None}, "question": text, "answer": truth}
        for image, text, truth in zip(
            questions.images, questions.texts, questions.truths, strict=True
        )
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    (folder / "utils.py").write_text(UTILS)
    (folder / "tiny_digits.yaml").write_text(TASK.format(file=folder / "rows.parquet"))


def write_vlmevalkit_table(questions, folder):
    """A multiple-choice table, whose ten options are the digits."""
    folder.mkdir()
    options = dict(zip(LETTERS, map(str, range(10)), strict=True))
    with open(folder / "TinyDigits.tsv", "w", newline="") as file:
        names = ["index", "image", "question", *LETTERS, "answer"]
        writer = csv.DictWriter(file, names, delimiter="\t")
        writer.writeheader()
        for number, image in enumerate(questions.images):
            row = {"index": number, "image": base64.b64encode(image).decode()}
            row |= {"question": questions.texts[number], **options}
            writer.writerow(row | {"answer": LETTERS[int(questions.truths[number])]})


def our_evaluation(questions):
    """The report of `grpo_latent.evaluate` on the same rows."""
    overrides = [
        f"model.path={questions.folder / 'model'}",
        "data.benchmark.name=digits",
        f"data.benchmark.path={questions.folder / 'rows.parquet'}",
        f"data.max_response_length={NEW_TOKENS}",
        "ablations=[]",
        "leak_prompts=0",
    ]
    with initialize_config_module("grpo_latent.config", version_base=None):
        return evaluate(compose("evaluate", overrides=overrides))
