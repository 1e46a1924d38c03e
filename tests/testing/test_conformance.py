"""Every registered mechanism conforms, and each kind of fault is caught by its check.

So does a mechanism of a user's own.

Not covered: engines other than `hf`, several ranks, bf16.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from grpo_latent import check_mechanism as command
from grpo_latent.errors import ConfigError, ConformanceError
from grpo_latent.latent.mechanisms import LVR, MECHANISMS, Mechanism, Refusal, SpanMechanism
from grpo_latent.latent.mechanisms.spans import SpanRows
from grpo_latent.testing import CHECKS, check_mechanism
from grpo_latent.testing.conformance import run_checks

SETTINGS = {
    "lvr": dict(steps=3),
    "ilvr": dict(steps=3),
    "ivt_lr": dict(steps=2, top_k_image=4),
    "coconut": dict(steps=2),
    "hybrid_gate": dict(answer_token="<answer>"),
    "own_slots": dict(steps=2),
}
VARIANTS = {
    "lvr latents_only": ("lvr", dict(steps=3, max_spans=2, head="glu", visibility="latents_only")),
    "lvr end vector": (
        "lvr",
        dict(
            steps=4,
            exit="latent_end",
            latent_end_token="<|lvr_latent_end|>",
            latent_end_threshold=30.0,
        ),
    ),
    "lvr end token": ("lvr", dict(steps=3, exit="end_token", start_is_action=False)),
    "hybrid_gate far from tokens": (
        "hybrid_gate",
        dict(answer_token="7", mixture_temperature=0.5, initial_min=0.01, initial_max=0.5),
    ),
    "coconut head": ("coconut", dict(steps=2, head="mlp")),
}


# of a user's own, in a folder from which a command is called: it feeds the same vector whatever
# was recorded
OWN = """
from dataclasses import dataclass
from typing import ClassVar

import torch

from grpo_latent.latent.mechanisms import SpanMechanism


@dataclass(frozen=True)
class Stray(SpanMechanism):
    published_tokens = {"start": "<latent>", "latent": "<step>", "end": "</latent>"}

    def compose(self, model, embeds_MH, recorded_MH):
        return torch.ones_like(recorded_MH)
"""


def test_every_registered_mechanism_has_settings_here():
    assert SETTINGS.keys() == MECHANISMS.keys()


@pytest.mark.parametrize("name", SETTINGS)
def test_registered_mechanisms_conform(name):
    outcomes = check_mechanism(name, **SETTINGS[name])
    ran = Counter(outcome.check for outcome in outcomes if outcome.skipped is None)
    assert {outcome.check for outcome in outcomes} == set(CHECKS)
    assert set(CHECKS) - set(ran) <= {"gradients", "placeholders"}, (
        "nothing else is skipped on both backbones"
    )


@pytest.mark.long
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_conform(name):
    cls, settings = VARIANTS[name]
    check_mechanism(cls, **settings)


# ---- a mechanism of a user's own
# -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scaled(SpanMechanism):
    """Spans of h times a learned number for each dimension."""

    published_tokens = {"start": "<latent>", "latent": "<step>", "end": "</latent>"}
    parameter_prefixes: ClassVar = ("my_scale",)

    def new_parameters(self, text_config, dtype, device):
        return {
            "my_scale": torch.nn.Parameter(
                torch.full((text_config.hidden_size,), 0.5, dtype=dtype, device=device)
            )
        }

    def make(self, model, source):
        return model.my_scale * source.hidden_MH


def test_a_mechanism_of_ones_own_conforms():
    """By its path; those with faults, below, by their class."""
    outcomes = check_mechanism(f"{__name__}:Scaled", steps=3)
    assert len(outcomes) == 2 * len(CHECKS) and not any(outcome.skipped for outcome in outcomes)


# ---- faults -------------------------------------------------------------------------------------
# ---------------------


@dataclass(frozen=True)
class Unnamed(Scaled):
    """Its parameters would be saved, and missed by whoever loads."""

    parameter_prefixes: ClassVar = ("scale",)


@dataclass(frozen=True)
class DividedByRows(Scaled):
    """What is fed depends on how many vectors there are."""

    def compose(self, model, embeds_MH, recorded_MH):
        return recorded_MH / recorded_MH.shape[0]


@dataclass(frozen=True)
class Noisy(Scaled):
    """Makes something else each time, and records that."""

    def make(self, model, source):
        return source.hidden_MH + torch.rand_like(source.hidden_MH)


@dataclass(frozen=True)
class Staggered(Scaled):
    """Steps of a row depend on its place in the batch."""

    def begin(self, model, steps_N, max_spans_N=None):
        return SpanRows(self, steps_N + torch.arange(len(steps_N)) % 2, max_spans_N)


class ForgetfulRows(SpanRows):
    def pack(self):
        in_span_N, end_is_due_N, num_fed_N, num_spans_N = super().pack()
        return in_span_N, end_is_due_N, torch.zeros_like(num_fed_N), num_spans_N


@dataclass(frozen=True)
class Forgetful(Scaled):
    """Loses the number of latents fed as soon as another engine goes on."""

    def begin(self, model, steps_N, max_spans_N=None):
        return ForgetfulRows(self, steps_N, max_spans_N)


class StuckRows(SpanRows):
    def keep_rows(self, rows_M):
        super().keep_rows(rows_M)
        self.in_span_N = torch.zeros_like(self.in_span_N)


@dataclass(frozen=True)
class Stuck(Scaled):
    """Leaves its spans when rows are dropped; the rollout of a small batch may not show it."""

    def begin(self, model, steps_N, max_spans_N=None):
        return StuckRows(self, steps_N, max_spans_N)


@dataclass(frozen=True)
class Unsaved(Scaled):
    """Leaves a setting out of latent_config.json."""

    def to_dict(self):
        return {name: value for name, value in super().to_dict().items() if name != "steps"}


@dataclass(frozen=True)
class Detached(Scaled):
    """Its parameter is used, and would never learn."""

    def make(self, model, source):
        return model.my_scale.detach() * source.hidden_MH


@dataclass(frozen=True)
class Deaf(Scaled):
    """Feeds the same vector whatever was recorded: ablations would find that nothing matters."""

    def compose(self, model, embeds_MH, recorded_MH):
        return (model.my_scale * 40).expand_as(recorded_MH)


@dataclass(frozen=True)
class Curt(Scaled):
    """Refuses without a reason."""

    def refusals(self, engine):
        return [] if engine == "hf" else [Refusal("mechanism", self.key(), "lvr", "")]


@dataclass(frozen=True)
class Broken(Scaled):
    def make(self, model, source):
        raise ZeroDivisionError("of its own")


FAULTS = {
    Unnamed: "declares",
    DividedByRows: "rollout_is_replay",
    Noisy: "recorded_is_made",
    Staggered: "batch",
    Forgetful: "resume",
    Stuck: "resume",
    Unsaved: "saves",
    Detached: "gradients",
    Deaf: "ablations",
    Curt: "refusals",
}


@pytest.mark.parametrize("cls", FAULTS, ids=lambda cls: cls.__name__)
def test_a_fault_is_caught_by_its_check(cls):
    """All checks run, in order, and this one is the first that fails."""
    with pytest.raises(ConformanceError) as caught:
        check_mechanism(cls, backbones=["qwen3"], steps=3)
    assert caught.value.where == f"check {FAULTS[cls]!r} of {__name__}:{cls.__name__} on qwen3"
    assert caught.value.got is not None or caught.value.expected is not None


def test_outcomes_print_as_a_line_a_check():
    outcomes = check_mechanism("coconut", steps=2)
    *lines, end = repr(outcomes).splitlines()
    said = dict(re.split(r"  +", line) for line in lines)
    assert list(said) == list(CHECKS) and end == "13 checks, none failed"
    nothing = "skipped on qwen3, qwen2_5_vl: the mechanism has no parameters"
    assert said.pop("gradients") == nothing
    assert set(said.values()) == {"ok on qwen3, qwen2_5_vl"}


def test_the_command_tells_all_that_fails_and_nothing_else_at_length(tmp_path, capfd, monkeypatch):
    """By `grpo-latent`, from a folder with a module of the user's own."""
    monkeypatch.chdir(tmp_path)
    Path("own_mechanisms.py").write_text(OWN)
    program = "import sys; from grpo_latent.cli import main; sys.exit(main())"
    asked = ["check-mechanism", "own_mechanisms:Stray", "--set", "steps=3"]
    environment = dict(os.environ, PYTHONPATH=str(Path(__file__).parents[2]))
    done = subprocess.run([sys.executable, "-P", "-c", program, *asked], env=environment)
    assert done.returncode == 2
    lines = capfd.readouterr().out.splitlines()
    assert "ablations          FAILED on qwen3, qwen2_5_vl" in lines
    assert len([line for line in lines if line.startswith("check 'ablations' of")]) == 2
    assert lines[-1] == "13 checks, 1 failed" and len(lines) == 16


def test_the_command_ends_with_0_where_nothing_fails(capsys, monkeypatch):
    monkeypatch.setattr(command, "CHECKS", ["declares", "refusals"])
    monkeypatch.setattr(command, "BACKBONES", ["qwen3"])
    assert command.main(["lvr", "--set", "steps=3"]) == 0
    assert "2 checks, none failed" in capsys.readouterr().out


def test_checks_that_are_left_are_run_behind_one_that_fails():
    outcomes = list(run_checks(Broken, ["rollout_is_replay", "refusals"], ["qwen3"], {"steps": 3}))
    assert [bool(outcome.failure) for outcome in outcomes] == [True, False]


def test_an_error_of_the_mechanism_is_told_with_the_check():
    with pytest.raises(
        ConformanceError, match="^check 'rollout_is_replay'.*got ZeroDivisionError: of its own"
    ):
        check_mechanism(Broken, backbones=["qwen3"], steps=3)


def test_a_mechanism_that_records_nothing_is_no_latent_mechanism():
    @dataclass(frozen=True)
    class Text(Mechanism):
        pass

    with pytest.raises(ConformanceError, match="recorded no vector"):
        check_mechanism(Text, checks=["rollout_is_replay"])


def test_a_class_that_nobody_can_import_cannot_be_saved():
    @dataclass(frozen=True)
    class Local(Scaled):
        pass

    with pytest.raises(ConformanceError, match="check 'saves'.*cannot import the mechanism"):
        check_mechanism(Local, checks=["saves"], backbones=["qwen3"], steps=3)


def test_unknown_checks_backbones_and_settings():
    with pytest.raises(ConfigError, match="unknown checks"):
        check_mechanism(LVR, checks=["speed"])
    with pytest.raises(ConfigError, match="no such tiny model"):
        check_mechanism(LVR, backbones=["gpt2"])
    with pytest.raises(ConfigError, match="unknown field"):
        check_mechanism(LVR, width=3)
