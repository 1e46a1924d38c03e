"""What an error becomes on its way between actors, and what the driver raises."""

import pickle

import pytest
import ray
from ray import cloudpickle
from ray.exceptions import ActorDiedError, GetTimeoutError, RayTaskError, WorkerCrashedError

from grpo_latent.errors import (
    CheckpointError,
    LatentMismatchError,
    RewardError,
    RolloutError,
    TrainingError,
)
from grpo_latent.verl_plugin.boot import remote_errors
from grpo_latent.verl_plugin.boot.remote_errors import portable


def test_errors_of_ours_keep_their_type():
    error = RewardError("no", kind="nan", where="reward 'x'")
    for given in (error, RayTaskError("compute_score", "traceback", error)):
        kept = portable(given)
        assert isinstance(kept, RewardError) and kept.kind == "nan"
    assert isinstance(portable(LatentMismatchError("x")), LatentMismatchError)


def through(error, *actors):
    """An error as it arrives from the last of some actors, each of which got it from the one before."""
    for name in actors:
        task_error = RayTaskError(name, f"Traceback of {name}\nlast line", error)
        error = cloudpickle.loads(cloudpickle.dumps(task_error)).as_instanceof_cause()
    return error


@pytest.mark.parametrize("actors", [["run"], ["check_parts", "run"], ["a", "b", "run"]])
def test_what_a_worker_raised_reaches_the_console_as_it_was(actors, monkeypatch):
    error = CheckpointError("a part has changed", where="x.pt", got="1", expected="2", fix="Go.")

    def get(reference):
        raise through(error, *actors)

    monkeypatch.setattr(remote_errors.ray, "get", get)
    with pytest.raises(CheckpointError) as caught:
        remote_errors.get("reference", "training", "train.log")
    assert type(caught.value) is CheckpointError and str(caught.value) == str(error)
    assert caught.value.fix == "Go." and portable(through(error, *actors)).where == "x.pt"


class Local(Exception):
    def __reduce__(self):
        raise TypeError("not portable")


class OursButLocal(RewardError):
    def __reduce__(self):
        raise TypeError("not portable")


@pytest.mark.parametrize(
    "error",
    [
        # Ray fails a call that has one of these as its argument
        ActorDiedError(),
        GetTimeoutError("boom"),
        RayTaskError("compute_score", "traceback", ActorDiedError()),
        Local("boom"),  # could not be pickled,
        OursButLocal("boom"),
        KeyError("boom"),  # nor is a foreign class sure to be known where it arrives
        SystemExit("boom"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_all_others_are_told_by_their_text(error):
    told = portable(error)
    assert type(told) is RolloutError and not isinstance(told, ray.exceptions.RayError)
    assert "boom" in str(told) or "ActorDiedError: The actor died unexpectedly" in str(told)
    assert str(pickle.loads(pickle.dumps(told))) == str(told)


@pytest.mark.parametrize("error", [ActorDiedError(), WorkerCrashedError(), GetTimeoutError("x")])
def test_the_driver_has_a_type_for_what_ray_lost(error, monkeypatch):
    def get(reference):
        raise error

    monkeypatch.setattr(remote_errors.ray, "get", get)
    with pytest.raises(
        TrainingError, match=f"training was lost; got {type(error).__name__}: .*log"
    ):
        remote_errors.get("reference", "training", "train.log")
