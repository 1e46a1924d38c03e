"""Tries a reward function on completions that a policy will one day produce."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from grpo_latent.errors import GrpoLatentError
from grpo_latent.rewards.functions import FunctionSpec
from grpo_latent.rewards.outcome import OK, Outcome
from grpo_latent.rewards.process import Call, RewardProcess

SLOW_S = 0.1  # a call; at 256 trajectories a step that is 25 s
LONG_CHARS = 100_000


@dataclass(frozen=True)
class Case:
    """A completion to try.

    Attributes:
        spans: the characters at which latent spans stood.
        slow_fix: what helps a function that does not return on it.
    """

    name: str
    solution_str: str
    spans: Sequence[int] = (0,)
    stop_reason: str = "eos"
    slow_fix: str = ""

    @property
    def latent(self) -> dict:
        return {
            "num_spans": len(self.spans),
            "num_steps": 8 * len(self.spans),
            "num_forced_ends": len(self.spans),
            "span_offsets": list(self.spans),
            "stop_reason": self.stop_reason,
        }


@dataclass
class CheckReport:
    """What trying a function found.

    Attributes:
        rows: (case, first outcome, verdict) in order.
        problems: what would break or spoil a run.
        warnings: what may be meant.
    """

    rows: list[tuple[Case, Outcome, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def completions(ground_truth: str, wrong_answer: str) -> list[Case]:
    """Makes normal and malformed completions about one question."""
    correct = f"<answer> {ground_truth} </answer>"
    return [
        Case("correct", correct),
        Case("correct, with text", f"Let me look. {correct}"),
        Case("wrong", f"<answer> {wrong_answer} </answer>"),
        Case("empty", "", spans=()),
        Case("latents only", ""),
        Case("blank", " \n\t "),
        Case("no answer tag", f"It is {ground_truth}."),
        Case("blank answer", "<answer></answer>"),
        Case("two answers", f"{correct} <answer> {wrong_answer} </answer>"),
        Case("nested tags", f"<answer><answer> {ground_truth} </answer></answer>"),
        Case("unclosed tag", f"<answer> {ground_truth}"),
        Case("closed before opened", f"</answer> {ground_truth} <answer>"),
        Case("text after the answer", f"{correct} I am sure."),
        Case(
            "HTML",
            f"<html><script>alert(1)</script>&lt;answer&gt;{ground_truth}&lt;/answer&gt;</html>",
        ),
        Case("100k characters", "<answer>" + "4 " * (LONG_CHARS // 2)),
        Case(
            "100k opened tags",
            "<answer>" * (LONG_CHARS // 8),
            slow_fix="a pattern such as <answer>(.*?)</answer> reads to the end from every opened "
            "tag: look for the closing one first",
        ),
        Case("unicode", "<answer> ４²⅓ 七 \U0001f600 \u202e \ufffd \x00 </answer>"),
        Case("huge number", "<answer> 9**9**9 </answer>"),
        Case("LaTeX", r"<answer> \frac{1}{\boxed{ $ \left( </answer>"),
        Case("no latent span", correct, spans=()),
        Case("span after the answer", correct, spans=(len(correct),)),
        Case("many spans", correct, spans=(0,) * 50),
        Case("cut at the length limit", correct, stop_reason="length"),
    ]


def check_function(
    spec: FunctionSpec,
    ground_truth: str = "4",
    wrong_answer: str = "5",
    data_source: str = "check",
    timeout_s: float = 5.0,
) -> CheckReport:
    """Calls the function on each completion twice, in a process that is killed on a time-out.

    Problems: it cannot be loaded, raises, hangs, returns no finite float, returns another score
    the second time, or edits its `extra_info`. Warnings: one score for everything, the right
    answer not above the wrong one, slow calls, a score for a row without ground truth.
    """
    report = CheckReport()
    try:
        process = RewardProcess([spec], timeout_s)
    except GrpoLatentError as error:
        report.problems.append(str(error))
        return report
    cases = completions(ground_truth, wrong_answer)

    def call(case: Case, truth: object) -> Call:
        extra_info = {"index": 0, "split": "check", "latent": case.latent}
        arguments = {
            "data_source": data_source,
            "solution_str": case.solution_str,
            "ground_truth": truth,
        }
        return Call(0, {**arguments, "extra_info": extra_info}, probe=True)

    try:
        # lazy imports would make the first call look slow
        process.run([call(cases[0], ground_truth)])
        first = process.run([call(case, ground_truth) for case in cases])
        # in another order, so that a function that remembers its last call is found out too
        second = process.run([call(case, ground_truth) for case in reversed(cases)])[::-1]
        without_truth = process.run([call(cases[0], None)])[0]
    finally:
        process.close()
    for case, one, two in zip(cases, first, second, strict=True):
        verdict = _verdict(one, two)
        report.rows.append((case, one, verdict))
        if verdict:
            is_slow = "timeout" in (one.kind, two.kind)
            fix = f"; {case.slow_fix}" if is_slow and case.slow_fix else ""
            report.problems.append(f"{case.name}: {verdict}{fix}")
    _warn(report, dict(zip([c.name for c in cases], first, strict=True)), without_truth)
    return report


def _verdict(one: Outcome, two: Outcome) -> str:
    failed = one if not one.is_ok else two
    if not failed.is_ok:
        what = {
            "exception": "raised an exception",
            "timeout": "did not return",
            "type": "wrong type",
        }
        return f"{what.get(failed.kind, f'returned {failed.kind}')}: {failed.detail}".rstrip(": ")
    if (one.score, one.extras) != (two.score, two.extras):
        return f"not deterministic: {one.score} {one.extras}, then {two.score} {two.extras}"
    return "changed its extra_info" if one.mutated or two.mutated else ""


def _warn(report: CheckReport, outcomes: dict[str, Outcome], without_truth: Outcome) -> None:
    scores = {outcome.score for outcome in outcomes.values() if outcome.is_ok}
    # where calls failed, that is the problem
    if len(scores) == 1 and all(outcome.is_ok for outcome in outcomes.values()):
        report.warnings.append(f"always {scores.pop()}: a group of equal rewards teaches nothing")
    right = outcomes["correct"].score
    wrong = outcomes["wrong"].score
    # None where the call failed, which is a problem already
    if right is not None and wrong is not None and not right > wrong and len(scores) > 1:
        report.warnings.append(
            f"the right answer scores {right}, the wrong one {wrong}; "
            "if it is meant to judge answers, give it "
            "its kind of --ground-truth and --wrong-answer"
        )
    slow = {
        name: outcome.seconds
        for name, outcome in outcomes.items()
        if outcome.kind == OK and outcome.seconds > SLOW_S
    }
    if slow:
        name = max(slow, key=lambda name: slow[name])
        report.warnings.append(
            f"slow on {len(slow)} of {len(outcomes)} completions: {slow[name]:.2f} s on {name!r}"
        )
    if without_truth.is_ok:
        report.warnings.append(
            f"scores {without_truth.score} where ground_truth is None; "
            "if it is meant to judge answers, let it raise there, "
            "or bad rows go unnoticed"
        )
