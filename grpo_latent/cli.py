"""The command `grpo-latent`: one table, whose rows are the `python -m grpo_latent.…` forms.

    grpo-latent init quickstart my_work     # copies a recipe to change
    grpo-latent train --help                # a sub-command's own help

Exit codes are those of `grpo_latent.common.command`.
"""

from __future__ import annotations

import os
import runpy
import sys

from grpo_latent.common.command import command
from grpo_latent.common.spelling import nearest_fix
from grpo_latent.errors import ConfigError

# name -> module, and what it does
COMMANDS = {
    "init": ("grpo_latent.init", "copies a recipe into a folder of yours"),
    "doctor": ("grpo_latent.doctor", "says what can run on this machine, and what to do"),
    "sft": ("grpo_latent.sft", "stage 1: supervised training of a latent model"),
    "train": ("grpo_latent.train", "stage 2: GRPO over latent trajectories"),
    "evaluate": ("grpo_latent.evaluate", "how right a checkpoint is, and are its latents used"),
    "inspect": ("grpo_latent.inspect", "writes the page of a run"),
    "generate": ("grpo_latent.generate", "prints what a checkpoint answers"),
    "serve": ("grpo_latent.serve", "vLLM's server with latents"),
    "import": ("grpo_latent.import", "says what a published checkpoint is, or converts it"),
    "add-latents": ("grpo_latent.add_latents", "gives a plain model latents, without SFT"),
    "check-reward": ("grpo_latent.check_reward", "runs a reward function on odd completions"),
    "check-mechanism": ("grpo_latent.check_mechanism", "says which promises a mechanism keeps"),
    "check-cluster": ("grpo_latent.check_cluster", "asks each node of a cluster if it is ready"),
}


def usage() -> str:
    rows = [f"  {name:16} {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(["usage: grpo-latent COMMAND [ARGUMENT …]", "", *rows, ""])


@command
def main(argv: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage(), end="")
        return
    name, *rest = arguments
    if name not in COMMANDS:
        raise ConfigError(
            "no such command",
            where="grpo-latent",
            got=name,
            expected=f"one of {list(COMMANDS)}",
            fix=nearest_fix("Write grpo-latent {}", name, COMMANDS),
        )
    sys.argv = [f"grpo-latent {name}", *rest]
    # as `python -m` does it: modules in the current folder are found, and what a module does before
    # its `main`, it does here, too
    sys.path.insert(0, os.getcwd())
    runpy.run_module(COMMANDS[name][0], run_name="__main__")


if __name__ == "__main__":
    sys.exit(main())
