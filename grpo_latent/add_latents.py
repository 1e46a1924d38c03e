"""A plain model gets latents, without SFT:

    python -m grpo_latent.add_latents MODEL OUTPUT --mechanism NAME [--set SETTING=VALUE …]

For mechanisms that RL alone trains, and for the untrained start of others: tokens are added, the
mechanism's parameters are fresh, everything else is the model's. MODEL is a folder, which is only
read, or owner/name of a model on the hub.
"""

from __future__ import annotations

import argparse
import sys

from grpo_latent.common.arguments import add_settings, read_settings
from grpo_latent.common.command import command
from grpo_latent.common.dtypes import parse_dtype
from grpo_latent.latent.mechanisms import MECHANISMS
from grpo_latent.models.plain import add_latents


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder of a plain Hugging Face model, or owner/name")
    parser.add_argument("output", help="new folder")
    names = ", ".join(MECHANISMS)
    parser.add_argument(
        "--mechanism",
        required=True,
        help=f"{names}, or a class of your own as package.module:Class",
    )
    add_settings(parser)
    parser.add_argument(
        "--dtype",
        default="auto",
        help="of the weights: float32, bfloat16, float16, or as they are",
    )
    parser.add_argument("--seed", type=int, default=0, help="of new embeddings and parameters")
    return parser.parse_args(argv)


@command
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    settings = read_settings(args)
    dtype = args.dtype if args.dtype == "auto" else parse_dtype(args.dtype, "--dtype")
    mechanism = add_latents(args.model, args.output, args.mechanism, settings, args.seed, dtype)
    print(f"{args.output}: {mechanism.key()}, latent tokens {mechanism.token_ids}")


if __name__ == "__main__":
    sys.exit(main())
