"""A latent checkpoint as a model of lmms-eval (0.7).

    lmms-eval --model grpo_latent --model_args pretrained=LVR-7B,engine=hf,dtype=bfloat16 \\
      --tasks mmvp --batch_size 32

Its chat protocol: a task gives messages, and the model text. A task's stop strings (`until`) are
not applied, as in lmms-eval's own chat models: they would cut a text before its answer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NoReturn

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms

from grpo_latent.errors import ConfigError
from grpo_latent.harnesses.answers import Answerer, Question, read_content

# of a task that sets no bound, as lmms-eval's chat models have it
DEFAULT_NEW_TOKENS = 4096
# arguments of engine vllm
VLLM_SETTINGS = ("max_model_len", "max_latents", "enforce_eager", "gpu_memory_utilization")


class GrpoLatent(lmms):
    """Answers an lmms-eval task's questions.

    Args:
        pretrained: the checkpoint's folder.
        batch_size: questions that are decoded together; lmms-eval's `--batch_size`.
        settings: of `Answerer`: engine, dtype, device, steps, min_new_tokens, answer_only, seed;
            with `engine=vllm` the `VLLM_SETTINGS`, too.
    """

    is_simple = False

    def __init__(self, pretrained: str, batch_size: int | str = 1, **settings: Any):
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ConfigError(
                "not a batch size", where="batch_size", got=batch_size, expected="int >= 1"
            )
        self.batch_size = int(batch_size)
        known = ["engine", "dtype", "device", "steps", "min_new_tokens", "answer_only", "seed"]
        if settings.get("engine") == "vllm":
            known += VLLM_SETTINGS
        unknown = sorted(set(settings) - set(known))
        if unknown:
            raise ConfigError(
                "unknown argument of the model",
                where="--model_args",
                got=unknown,
                expected=f"pretrained, and some of {', '.join(known)}",
            )
        self.answerer = Answerer(str(pretrained), **settings)

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers requests, those of equal sampling settings together."""
        by_settings: dict[tuple, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            by_settings[sampling_of(request.args[2])].append(index)
        results: dict[int, GenerationResult] = {}
        for settings, indices in by_settings.items():
            for start in range(0, len(indices), self.batch_size):
                batch = indices[start : start + self.batch_size]
                questions = [self._question(requests[index]) for index in batch]
                answers = self.answerer(questions, *settings)
                for index, answer in zip(batch, answers, strict=True):
                    counts = TokenCounts(output_tokens=answer.num_tokens)
                    results[index] = GenerationResult(answer.text, counts)
                    key = (requests[index].args[0], requests[index].args[2])
                    self.cache_hook.add_partial("generate_until", key, answer.text)
        return [results[index] for index in range(len(requests))]

    def _question(self, request: Instance) -> Question:
        _, doc_to_messages, _, doc_id, task, split = request.args
        where = f"{task} {split} row {doc_id}"
        return question_of(doc_to_messages(self.task_dict[task][split][doc_id]), where)

    def loglikelihood(self, requests: list[Instance]) -> NoReturn:
        self._refuse("loglikelihood")

    def generate_until_multi_round(self, requests: list[Instance]) -> NoReturn:
        self._refuse("generate_until_multi_round")

    def _refuse(self, what: str) -> NoReturn:
        raise ConfigError(
            "a task of another kind",
            where="--tasks",
            got=f"output_type {what}",
            expected="generate_until: an answer is decoded, latents included",
        )


def sampling_of(settings: dict) -> tuple[int, float, float, int]:
    """Reads a task's `generation_kwargs`: new tokens, temperature (0 is greedy), top-p and top-k.

    >>> sampling_of({"max_new_tokens": 16, "temperature": 0.7, "do_sample": False})
    (16, 0.0, 1.0, -1)

    Raises:
        ConfigError: beam search.
    """
    if (settings.get("num_beams") or 1) > 1:
        raise ConfigError(
            "latents do not go through beam search",
            where="generation_kwargs.num_beams",
            got=settings["num_beams"],
            expected="1",
            fix="Pass --gen_kwargs num_beams=1.",
        )
    temperature = float(settings.get("temperature") or 0.0)
    if settings.get("do_sample") is False:
        temperature = 0.0
    top_p, top_k = settings.get("top_p") or 1.0, settings.get("top_k") or -1
    if temperature == 0:
        top_p, top_k = 1.0, -1
    bound = settings.get("max_new_tokens") or DEFAULT_NEW_TOKENS
    return int(bound), temperature, float(top_p), int(top_k)


def question_of(messages: Sequence[dict], where: str) -> Question:
    """Reads lmms-eval's messages, whose images are pictures or paths of files.

    Raises:
        DataError: video, audio, or an image that is not here.
    """
    ours, images = [], []
    for message in messages:
        content, seen = read_content(message["content"], where, "text", "url")
        ours.append({"role": message["role"], "content": content})
        images += seen
    return Question(tuple(ours), tuple(images))
