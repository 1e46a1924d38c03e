"""Guards on folders without weights, and what the trainer does with them."""

from types import SimpleNamespace

from test_alarms import FINE

from grpo_latent.common.best_checkpoint import Best
from grpo_latent.verl_plugin.boot.options import LatentOptions
from grpo_latent.verl_plugin.trainer import checkpoint
from grpo_latent.verl_plugin.trainer.guards import Guards


def make_guards(root, save_freq=1, keep_best=True, val_only=False, **alarm):
    options = LatentOptions(alarm=alarm, keep_best=keep_best)
    trainer = SimpleNamespace(default_local_dir=str(root), save_freq=save_freq, val_only=val_only)
    return Guards(options, trainer)


def take_step(guards, step, reward=0.6, score=None, is_saved=True):
    """What the trainer does in a step that does not go back: save, validate, judge, keep, commit."""
    folder = guards.root / f"global_step_{step}"
    if is_saved:
        folder.mkdir(parents=True, exist_ok=True)
    guards.alarms.after_validation(score, 0.01)
    lines = guards.after_step(FINE | {"critic/score/mean": reward})
    if not guards.reasons_to_go_back() and guards.is_best(score):
        folder.mkdir(parents=True, exist_ok=True)
        guards.keep(Best.of_step(step, score, "val-core/x/acc/mean@1"), is_extra=not is_saved)
    if folder.is_dir():
        commit(guards, step)
    return lines


def commit(guards, step):
    guards.save(guards.root / f"global_step_{step}")
    checkpoint.write_tracker(guards.root, step)
    guards.name_best()
    guards.remove_superseded(step)


def go_back(guards, step):
    """What the trainer does at the end of a step whose alarm sounds."""
    folder = guards.last_good
    factor = guards.go_back(folder)
    (guards.root / f"global_step_{step}").mkdir(exist_ok=True)
    commit(guards, step)
    return folder.name, factor


def folders(root):
    return sorted(int(path.name.removeprefix("global_step_")) for path in root.glob("global_*"))
