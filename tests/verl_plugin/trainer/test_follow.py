"""How the driver follows a run to its end, whoever dies on the way. Ray is a stand-in."""

from types import SimpleNamespace

import pytest
from ray.exceptions import ActorDiedError, GetTimeoutError, RayTaskError

from grpo_latent.errors import ActorDeathError, RewardError, RolloutError
from grpo_latent.verl_plugin.boot import remote_errors
from grpo_latent.verl_plugin.boot.actor_watch import DeadActor
from grpo_latent.verl_plugin.trainer import reports

DEAD = DeadActor("reward worker", "RewardLoopWorker", 7, "10.0.0.7", "killed", "/logs/7.err")


class Watch:
    """What died at which of the driver's looks: by itself (`crashed`), or by `ray.kill`."""

    def __init__(self, crashed_at=None, killed_at=None, grace=2):
        self.position, self.looks, self.grace = "before the first step", 0, grace
        self.crashed_at, self.killed_at = crashed_at, killed_at
        self.asked_at: list[int] = []  # looks at which the board was called

    def first_death(self, with_killed=True, has_failed=False):
        times = [self.crashed_at, self.killed_at if with_killed else None]
        return DEAD if any(t is not None and t <= self.looks for t in times) else None

    def check(self):
        self.looks += 1
        died_at = self.crashed_at if self.crashed_at is not None else self.killed_at
        if died_at is not None and self.looks >= died_at + self.grace:
            raise DEAD.error(self.position)


def follow(monkeypatch, watch, ends_at, result, queue=lambda look: []):
    """Follows a run that ends at look number `ends_at` (None: never) with `result`."""
    seen = []

    def get(reference, timeout=None):
        value = queue(watch.looks) if reference == "reports" else result
        if isinstance(value, Exception):
            raise value
        return value

    def wait(references, timeout):
        assert watch.looks < 20, "the driver waits for ever"
        is_done = ends_at is not None and watch.looks >= ends_at
        return (references, []) if is_done else ([], references)

    monkeypatch.setattr(reports.ray, "wait", wait)
    monkeypatch.setattr(reports.ray, "get", get)
    monkeypatch.setattr(remote_errors.ray, "get", get)
    monkeypatch.setattr(reports.time, "sleep", lambda seconds: None)

    def ask():
        watch.asked_at.append(watch.looks)
        return "reports"

    board = SimpleNamespace(take=SimpleNamespace(remote=ask))
    reports.follow(board, "run", seen.append, watch, "train.log")
    return seen


def step_2(look):
    return [("step", 2, 9, {})] if look == 1 else []


def test_a_run_that_ends_well_raises_nothing(monkeypatch):
    watch = Watch()
    seen = follow(monkeypatch, watch, ends_at=3, result=None, queue=step_2)
    assert [report.step for report in seen] == [2] and watch.position == "last step 2/9"


def test_what_verl_kills_when_a_run_is_over_is_no_death(monkeypatch):
    follow(monkeypatch, Watch(killed_at=2), ends_at=3, result=None)


@pytest.mark.parametrize("death", ["crashed_at", "killed_at"])
def test_a_run_that_hangs_after_a_death_is_ended(monkeypatch, death):
    with pytest.raises(ActorDeathError, match="reward worker, pid 7, .* last step 2/9"):
        follow(monkeypatch, Watch(**{death: 1}), ends_at=None, result=None, queue=step_2)


@pytest.mark.parametrize(
    "error",
    [
        RolloutError("a rollout failed", got="ActorDiedError: …"),
        ActorDiedError(),
        RayTaskError("run", "traceback", ActorDiedError()),
    ],
    ids=["typed", "lost", "of Ray"],
)
def test_a_run_that_ends_because_of_a_death_names_it(monkeypatch, error):
    with pytest.raises(ActorDeathError, match="Its log is /logs/7.err"):
        follow(monkeypatch, Watch(crashed_at=1), ends_at=2, result=error)


def test_a_run_that_fails_by_itself_says_why(monkeypatch):
    error = RayTaskError("run", "traceback", RewardError("returned nan", kind="nan"))
    with pytest.raises(RewardError, match="returned nan"):
        follow(monkeypatch, Watch(killed_at=1), ends_at=2, result=error)
    with pytest.raises(RuntimeError, match="training failed"):
        follow(monkeypatch, Watch(), 2, RayTaskError("run", "traceback", KeyError("x")))


@pytest.mark.parametrize("error", [ActorDiedError(), GetTimeoutError()])
def test_a_board_that_does_not_answer_stops_no_run(monkeypatch, error):
    assert follow(monkeypatch, Watch(), 3, None, queue=lambda look: error) == []


def test_the_death_of_the_board_is_not_waited_for(monkeypatch):
    """Nobody else notices it, and a short run would end well before the grace is over."""

    def queue(look):
        return ActorDiedError() if look >= 2 else []

    with pytest.raises(ActorDeathError, match="before the first step"):
        follow(monkeypatch, Watch(crashed_at=2, grace=9), ends_at=4, result=None, queue=queue)


def test_what_a_slow_board_hands_out_late_is_not_lost(monkeypatch):
    """Its call is waited for again: a second one would get what came after it."""
    late = {0: GetTimeoutError(), 1: GetTimeoutError(), 2: [("step", 2, 9, {})]}
    watch = Watch()
    seen = follow(monkeypatch, watch, 4, None, queue=lambda look: late.get(look, []))
    assert [report.step for report in seen] == [2]
    assert watch.asked_at == [0, 3, 4]
