"""Checks recipes/treatments at paper scale without weights or GPU.

The config composes and agrees with each treatment in turn.

python recipes/treatments/validate.py [hydra overrides]
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # recipes are scripts, not a package
import paper_scale  # noqa: E402

from grpo_latent.latent.treatments import TREATMENTS  # noqa: E402
from grpo_latent.verl_plugin.boot.options import LatentOptions  # noqa: E402

HERE = Path(__file__).parent


def main(overrides: list[str]) -> None:
    for name in (None, *TREATMENTS):
        changes = [] if name is None else [f"latent.treatment.name={name}"]
        if name is not None and not TREATMENTS[name].is_action:  # no density, no KL
            changes.append("latent.treatment.kl_coef=0")
        config = paper_scale.check_grpo(HERE, "monet_vlpo", changes + overrides)
        treatment = LatentOptions.from_rollout(config.actor_rollout_ref.rollout).treatment
        print(f"monet_vlpo{'' if name is None else f' as {name}'}: valid, {treatment}")
        for note in treatment.notes():
            print(f"  note: {note}")


if __name__ == "__main__":
    main(sys.argv[1:])
