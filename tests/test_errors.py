"""Errors say what, where, got, expected and fix.

They are what a caller would catch, and they cross process borders.
"""

import pickle

import pytest
import ray.cloudpickle

from grpo_latent import errors
from grpo_latent.errors import ConfigError, GrpoLatentError, RewardError

ALL = [
    value
    for value in vars(errors).values()
    if isinstance(value, type)
    and issubclass(value, GrpoLatentError)
    and value is not GrpoLatentError
]
STANDARD = (ValueError, RuntimeError)
FIELDS = dict(where="row 3", got=[1, 2], expected="one number", fix="Drop the row.")


def test_there_are_errors():
    assert len(ALL) >= 8


@pytest.mark.parametrize("error", ALL)
def test_each_is_documented_typed_and_survives_pickling(error):
    assert issubclass(error, STANDARD) and error.__doc__
    original = error("two answers", **FIELDS)
    assert str(original) == "row 3: two answers; got [1, 2]; expected one number. Drop the row."
    # twice, as when a worker hands an error on; by either pickle, since Ray has its own
    for library in (pickle, ray.cloudpickle):
        copy = library.loads(library.dumps(pickle.loads(pickle.dumps(original))))
        assert type(copy) is error and str(copy) == str(original)
        assert copy.__dict__ == original.__dict__ and copy.args == original.args


def test_message_with_the_first_field_only():
    assert str(ConfigError("no end-of-sequence token")) == "no end-of-sequence token."


@pytest.mark.parametrize("got", [0, False, "", []])
def test_falsy_values_are_shown(got):
    assert f"got {got!r}." in str(ConfigError("bad", got=got))


def test_long_values_are_cut():
    error = ConfigError("bad", got="x" * 10_000)
    assert (
        len(error.got) == GrpoLatentError.MAX_GOT_CHARS
        and error.got.endswith("…")
        and len(str(error)) < 400
    )


def test_a_message_is_one_line_whatever_a_library_says():
    assert str(ConfigError("bad", got="first\n   second\n")) == "bad; got first second."
    assert "\n" not in str(ConfigError("bad", got="\n"))


@pytest.mark.parametrize("kind", RewardError.KINDS)
def test_reward_errors_keep_their_kind(kind):
    copy = pickle.loads(pickle.dumps(RewardError("bad", kind=kind, where="group 1")))
    assert copy.kind == kind and copy.where == "group 1"
