"""How papers ask and count the benchmarks that they report: `data.benchmark.preset`.

    preset    benchmarks               read from the authors' own evaluation code
    lvr       mmvp, vstar, blink       2509.24251: "A. …" options, 4, 8 and 16 steps, 512 positions
    ilvr      comt                     2512.05665: the text of its file as it is, 4096 positions
    ivt_lr    m3cot, scienceqa         2510.12603: "[Question]:{…}", images at 280 x 280 (M3CoT)

A preset writes the question anew, drops what the paper left out, and counts an answer as the
authors' code does (`published_accuracy` of a report), which is more lenient than our grader: the
strict numbers stand beside it. What a paper does not publish is not guessed: a benchmark that a
preset does not have is refused. `package.module:NAME` of a `Preset` stands wherever a name may.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from grpo_latent.common.registry import Registry, instance_of
from grpo_latent.errors import ConfigError, DataError
from grpo_latent.eval.benchmarks.choices import INSTRUCTION
from grpo_latent.eval.benchmarks.protocol import BenchmarkItem, PublishedGrade
from grpo_latent.eval.graders import LETTERS

PUBLISHED = "published_accuracy"


@dataclass(frozen=True)
class Form:
    """How one paper asks and counts one benchmark.

    Attributes:
        text: of a question, what stands behind its images.
        grade: how the authors' code counts a completion.
        note: what to compare with what, for the report.
        subsets: categories that the paper has; () for all.
        image_size: (width, height) of every image, None for its own.
        images_only: whether questions without an image are left out.
    """

    text: Callable[[BenchmarkItem], str]
    grade: PublishedGrade
    note: str
    subsets: tuple[str, ...] = ()
    image_size: tuple[int, int] | None = None
    images_only: bool = False


@dataclass(frozen=True)
class Preset:
    """How one paper evaluates.

    Attributes:
        forms: benchmark -> how it is asked and counted.
        max_new_tokens: positions of a completion, latents included.
        steps: lengths of a span that the paper lists, () where it has one.
    """

    name: str
    forms: Mapping[str, Form]
    max_new_tokens: int
    steps: tuple[int, ...] = ()

    def form(self, benchmark: str) -> Form:
        """The benchmark's form. Raises `ConfigError` where the paper has none."""
        if benchmark not in self.forms:
            raise ConfigError(
                f"preset {self.name} has no form of this benchmark",
                where="data.benchmark.preset",
                got=benchmark,
                expected=f"one of {sorted(self.forms)}",
                fix="Leave the preset out: the benchmark is then asked in our form.",
            )
        return self.forms[benchmark]

    def apply(self, items: Sequence[BenchmarkItem]) -> list[BenchmarkItem]:
        """Asks the items as the paper does; those that it left out are dropped.

        Raises:
            ConfigError: the paper has no form of the benchmark.
            DataError: nothing is left.
        """
        form = self.form(items[0].benchmark)
        kept = [item for item in items if not form.subsets or item.category in form.subsets]
        if form.images_only:
            kept = [item for item in kept if item.images]
        if not kept:
            raise DataError(
                f"no rows that preset {self.name} asks",
                where="data.benchmark",
                got=f"categories {sorted({item.category for item in items})}",
                expected=f"some of {list(form.subsets)}" if form.subsets else "rows with an image",
            )
        return [_asked(item, form) for item in kept]


def _asked(item: BenchmarkItem, form: Form) -> BenchmarkItem:
    content = [{"type": "image"} for _ in item.images]
    message = {"role": "user", "content": [*content, {"type": "text", "text": form.text(item)}]}
    images = item.images
    if form.image_size is not None:
        images = tuple(replace(image, size=form.image_size) for image in images)
    return replace(item, messages=(message,), images=images, published=form.grade)


# ---- LVR: the first character behind the last <answer>, of the text with all special tokens


def lvr_options(question: str, options: Sequence[str], between: str, end: str) -> str:
    """Writes a question as LVR's evaluation does.

    >>> print(lvr_options("Open?", ["Open", "Closed"], " ", ""))
    Open?
    Options:
    A. Open B. Closed
    Answer with the option's letter from the given choices directly.
    """
    lettered = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return f"{question}\nOptions:\n{between.join(lettered)}{end}\n{INSTRUCTION}"


def lvr_grade(completion: str, item: BenchmarkItem) -> bool:
    """Whether LVR's code counts the completion as right."""
    answer = completion.rsplit("<answer>", 1)[-1].split("</answer", 1)[0].strip()
    return answer.split(" ", 1)[0][:1] == item.answer


_LVR = PublishedGrade(lvr_grade, sees_special_tokens=True)
_LVR_STEPS = "LVR lists 4, 8 and 16 latent steps: the rows steps=4, 8 and 16 of decodings."
LVR = Preset(
    "lvr",
    {
        "mmvp": Form(
            lambda item: lvr_options(item.question, item.options, " ", ""),
            _LVR,
            f"LVR's 71.67 on MMVP is per question (215 of 300): compare {PUBLISHED}, never "
            f"pair_accuracy. {_LVR_STEPS}",
        ),
        "vstar": Form(
            # its file ends every text in the instruction already, which LVR's code says again
            lambda item: f"{item.question}\n{INSTRUCTION}",
            _LVR,
            f"LVR's V* is over all questions: compare {PUBLISHED}; its categories are in "
            f"published_by_category. {_LVR_STEPS}",
        ),
        "blink": Form(
            lambda item: lvr_options(item.question, item.options, "\n", "\n"),
            _LVR,
            "LVR's BLINK is five of the fourteen subsets, each in a column of its own: compare "
            f"published_by_category. {_LVR_STEPS}",
            subsets=("Counting", "IQ_Test", "Jigsaw", "Relative_Reflectance", "Spatial_Relation"),
        ),
    },
    max_new_tokens=512,
    steps=(4, 8, 16),
)

# ---- ILVR: what stands behind "answer is", else the only yes, no, true, false, a or b

_ILVR_STATED = tuple(
    re.compile(rf"{start}answer\s*(?:is)?\s*[:\uff1a]\s*([^\r\n]+)", re.IGNORECASE)
    for start in (r"final\s*", "")
)
_YES, _NO = {"yes", "true", "a"}, {"no", "false", "b"}


def ilvr_grade(completion: str, item: BenchmarkItem) -> bool:
    """Whether ILVR's code counts the completion as right; A is yes and B is no to it."""
    return _ilvr_normal(_ilvr_answer(completion.strip())) == _ilvr_normal(item.answer)


def _ilvr_answer(text: str) -> str:
    for pattern in _ILVR_STATED:
        stated = pattern.search(text)
        if stated is not None:
            return stated[1]
    words = [word for word in re.findall("[a-z]+", text.lower()) if word in _YES | _NO]
    return words[0] if len(words) == 1 else text


def _ilvr_normal(answer: str) -> str:
    word = answer.strip().lower()
    return "yes" if word in _YES else "no" if word in _NO else answer.strip()


ILVR = Preset(
    "ilvr",
    {
        "comt": Form(
            lambda item: item.question,
            PublishedGrade(ilvr_grade),
            f"ILVR's code compares one stated answer a row: compare {PUBLISHED}. It reads the "
            "decoded text with its special tokens, so an answer that ends the completion counts "
            "there only if a line break follows; here EOS is taken off first.",
        )
    },
    max_new_tokens=4096,
)

# ---- IVT-LR: every letter behind "the answer is", and the completion's own first letter

_IVT_LR_STATED = re.compile(r"(?:the\s+answer\s+is|answer:)\s*([a-z])", re.IGNORECASE)
_SQA_STATED = tuple(
    re.compile(rf"{before}({what})", re.IGNORECASE)
    for what in (r"\d", "[A-Z]")
    for before in (r"the\s+answer\s+is\s+", r"answer\s+is:?\s*")
)


def ivt_lr_text(item: BenchmarkItem, option: str) -> str:
    """Writes a question as IVT-LR's inference does, its braces included.

    Args:
        option: how a letter and its text are written, such as `{}.{{{}}}`.
    """
    lines = [
        option.format(letter, text.strip())
        for letter, text in zip(LETTERS, item.options, strict=False)
    ]
    return "\n".join([f"[Question]:{{{item.question.strip()}}}", "[Options]:", *lines, "Answer:"])


def m3cot_grade(completion: str, item: BenchmarkItem) -> bool:
    """Whether IVT-LR's code counts the completion as right: any stated letter may be the answer.

    It reads the prompt, too, which ends in "Answer:".
    """
    stated = {found[1].upper() for found in _IVT_LR_STATED.finditer(f"Answer:\n{completion}")}
    return item.answer in stated


def scienceqa_grade(completion: str, item: BenchmarkItem) -> bool:
    """Whether IVT-LR's code counts the completion as right: the first stated index, or letter."""
    for pattern in _SQA_STATED:
        stated = pattern.search(completion)
        if stated is not None:
            said = stated[1].upper()
            index = int(said) if said.isdigit() else LETTERS.index(said)
            return index == LETTERS.index(item.answer)
    return False


IVT_LR = Preset(
    "ivt_lr",
    {
        "m3cot": Form(
            lambda item: ivt_lr_text(item, "{}.{{{}}}"),
            PublishedGrade(m3cot_grade),
            "IVT-LR counts a row whose completion begins with the right letter or states it "
            f"anywhere: compare {PUBLISHED}. Its SFT writes (A). where its inference writes A.",
            image_size=(280, 280),
            images_only=True,
        ),
        "scienceqa": Form(
            lambda item: ivt_lr_text(item, "({}).{{{}}}"),
            PublishedGrade(scienceqa_grade),
            f"IVT-LR's ScienceQA is over questions with an image: compare {PUBLISHED}. The form "
            "is that of its Chameleon script, the one that is published.",
            images_only=True,
        ),
    },
    max_new_tokens=512,
)

PRESETS: Registry[Preset] = Registry("preset", instance_of(Preset), lambda preset: (preset.name,))
for _preset in (LVR, ILVR, IVT_LR):
    PRESETS.register(_preset)


def find_preset(name: str) -> Preset:
    """Finds the preset of a name, or a user's own of package.module:NAME.

    Raises:
        ConfigError: unknown, not importable, or no `Preset`.
    """
    return PRESETS.find(name, "data.benchmark.preset")
