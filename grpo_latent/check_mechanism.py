"""`python -m grpo_latent.check_mechanism NAME` says which promises a mechanism keeps.

    python -m grpo_latent.check_mechanism my_work.mine:Scaled --set steps=3

Rollout against replay, batches, resume, saving, gradients, ablations, on tiny models that are
built here: a line a check. Exit code 0 if all hold, 2 if one does not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from transformers.utils.logging import disable_progress_bar

from grpo_latent.common.arguments import add_settings, read_settings
from grpo_latent.common.command import DONE, REFUSED, command
from grpo_latent.latent.mechanisms import MECHANISMS
from grpo_latent.testing.cases import BACKBONES
from grpo_latent.testing.conformance import CHECKS, Outcomes, run_checks


@command
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m grpo_latent.check_mechanism",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = ", ".join(MECHANISMS)
    parser.add_argument("mechanism", help=f"{names}, or a class of yours: package.module:Class")
    add_settings(parser)
    options = parser.parse_args(arguments)
    disable_progress_bar()  # transformers', for reading and writing weights
    settings = read_settings(options)
    outcomes = Outcomes(run_checks(options.mechanism, CHECKS, BACKBONES, settings))
    print(outcomes)
    return REFUSED if any(outcome.failure for outcome in outcomes) else DONE


if __name__ == "__main__":
    sys.exit(main())
