"""Coconut's and CODI's files, written by modules that are built and named as the authors' are.

The base models are folders as published: Llama's with as many embeddings as tokens, GPT-2's with its
byte-level `vocab.json` and `merges.txt`. peft itself names CODI's adapters.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from latent_cases import WORDS
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from grpo_latent.models import tiny

QUESTIONS = ("read red ?", "green ?", "? ? blue read")
NUM_POSITIONS = 96  # of the tiny GPT-2
_ADAPTED = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}


class Coconut(nn.Module):
    """What Coconut's run.py saves: the model, and its embeddings once more."""

    def __init__(self, model):
        super().__init__()
        self.base_causallm = model
        self.embedding = model.get_input_embeddings()

    def project(self, hidden):
        return hidden


class CODI(nn.Module):
    """What CODI's train.py saves: the adapted model, and its projection."""

    def __init__(self, model, family):
        super().__init__()
        targets = _ADAPTED[family]
        self.codi = get_peft_model(
            model, LoraConfig(r=4, lora_alpha=32, lora_dropout=0.1, target_modules=targets)
        )
        size = model.config.hidden_size
        self.prj = nn.Sequential(
            nn.Dropout(0.0), nn.Linear(size, size), nn.GELU(), nn.Linear(size, size)
        )
        self.prj.add_module("ln", nn.LayerNorm(size))

    def project(self, hidden):
        return self.prj(hidden)


@dataclass(frozen=True)
class Published:
    """One system's file.

    Attributes:
        wrapper: what was saved; `model` is it without the wrapper, adapters unmerged.
        tail: what stands behind a question.
        start, end: ids of the delimiters.
    """

    path: Path
    base: Path
    wrapper: nn.Module
    tokenizer: PreTrainedTokenizerBase
    tail: str
    start: int
    end: int

    @property
    def model(self):
        return getattr(self.wrapper, "base_causallm", None) or self.wrapper.codi

    def prompt(self, question):
        return self.tokenizer(question + self.tail).input_ids

    @torch.no_grad()
    def decode(self, question, num_tokens):
        """Greedy, without a cache, as both papers' code does: question, start, six times h, end, text.

        Returns:
            The tokens said, and the log-prob of each.
        """
        table = self.model.get_input_embeddings().weight
        vectors = [*table[torch.tensor(self.prompt(question))], table[self.start]]

        def forward():
            out = self.model(inputs_embeds=torch.stack(vectors)[None], output_hidden_states=True)
            return out.logits[0, -1], out.hidden_states[-1][0, -1]

        for _ in range(6):
            vectors.append(self.wrapper.project(forward()[1]))
        vectors.append(table[self.end])
        said, log_probs = [], []
        for _ in range(num_tokens):
            logits, _ = forward()
            # the tokens of latents are never said here
            said.append(int(logits[: len(table) - 3].argmax()))
            log_probs.append(float(logits.log_softmax(-1)[said[-1]]))
            vectors.append(table[said[-1]])
        return said, log_probs


def write_base(folder, family, hidden=32):
    """A base model's folder; returns the model, its numbers large enough to matter."""
    sizes = tiny.TinySizes(hidden=hidden)
    if family == "llama":
        model, tokenizer, _ = tiny._tiny_text("Llama", WORDS, sizes, 0, ())
        tokenizer.save_pretrained(folder)
        size = len(tokenizer)
    else:
        vocab = {letter: i for i, letter in enumerate(bytes_to_unicode().values())}
        size = len(vocab) + 1
        vocab["<|endoftext|>"] = size - 1
        folder.mkdir(parents=True)
        (folder / "vocab.json").write_text(json.dumps(vocab))
        (folder / "merges.txt").write_text("#version: 0.2\n")
        config = GPT2Config(
            vocab_size=size,
            n_positions=NUM_POSITIONS,
            n_embd=hidden,
            n_layer=2,
            n_head=2,
            bos_token_id=size - 1,
            eos_token_id=size - 1,
        )
        model = tiny._build(GPT2LMHeadModel, config, 0)
    model.resize_token_embeddings(size)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.mul_(_scale(name))
    model.save_pretrained(folder)
    return model


def _scale(name):
    if "wpe" in name:
        return 40.0
    if "wte" in name:  # the logits', too
        return 15.0
    return 40.0 if "embed" in name or "lm_head" in name else 6.0


def write_file(folder, system, family, hidden=32):
    """The file of one system's model in `folder`, beside the base model's folder."""
    base = write_base(folder / "base", family, hidden)
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    model = copy.deepcopy(base)
    size = len(tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model.resize_token_embeddings(size + 3)
        wrapper = Coconut(model) if system == "Coconut" else CODI(model, family)
        with torch.no_grad():
            for name, parameter in wrapper.named_parameters():
                if "lora_B" in name:  # peft's own are zeros
                    parameter.normal_(std=0.02)
    wrapper.eval()
    state = wrapper.state_dict()
    if system == "Coconut":
        path = folder / "checkpoint_30"
        torch.save(state, path)
        return Published(path, folder / "base", wrapper, tokenizer, "\n", size, size + 1)
    if family == "gpt2":
        path = folder / "pytorch_model.bin"
        torch.save(state, path)
    else:
        path = folder / "model.safetensors"
        save_file({name: value.contiguous().clone() for name, value in state.items()}, path)
    return Published(path, folder / "base", wrapper, tokenizer, "", size + 1, size + 2)
