"""Prints what a latent model answers, and how many latent steps it took.

    python -m grpo_latent.generate MODEL --prompt TEXT [--image FILE …]

One line of JSON a completion: text, number of latent steps of each span, why it stopped, tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from PIL import Image

from grpo_latent.common.arguments import check_arguments
from grpo_latent.common.command import add_verify_digests, command
from grpo_latent.common.dtypes import parse_dtype
from grpo_latent.common.kinds import null_or, number, whole
from grpo_latent.data.image_refs import ImageRef
from grpo_latent.rollout.llm import ENGINES, LatentLLM
from grpo_latent.rollout.protocol import SamplingParams


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments of the command line; raises `ConfigError` at one that is out of range."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder of a latent checkpoint")
    parser.add_argument(
        "--prompt", required=True, help="user message; <image> stands where an image goes"
    )
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="once for each <image>, in order",
    )
    parser.add_argument("--engine", choices=ENGINES, default="hf")
    parser.add_argument("--dtype", default="float32", help="of the weights, or bfloat16, float16")
    parser.add_argument("--device", default="cpu", help="of engine hf")
    parser.add_argument("--num", type=int, default=1, metavar="N", help="completions")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument(
        "--steps", type=int, help="latent steps a span; the checkpoint's if left out"
    )
    parser.add_argument("--seed", type=int, default=0)
    add_verify_digests(parser)
    args = parser.parse_args(argv)
    check_arguments(
        args,
        num=whole(1),
        max_new_tokens=whole(1),
        temperature=number(at_least=0),
        steps=null_or(whole(0)),
        seed=whole(0),
    )
    return args


def read_image(path: str) -> Image.Image:
    """The image as training reads it, transparency over white.

    Raises:
        DataError: the file is missing, or no image.
    """
    return ImageRef(where="--image", path=Path(path)).open()


@command
def main(argv: list[str] | None = None) -> None:
    """Prints the completions of one prompt."""
    args = parse(argv)
    # before the model: a wrong file is told of in a second, not after minutes of loading
    images = [read_image(path) for path in args.image]
    sampling = SamplingParams(max_new_tokens=args.max_new_tokens, temperature=args.temperature)
    dtype = parse_dtype(args.dtype, "--dtype")
    llm = LatentLLM(
        args.model, args.engine, dtype, args.device, verify_digests=args.verify_digests
    )
    groups = llm.generate([args.prompt], [images], sampling, args.num, args.seed, args.steps)
    for trajectory in groups[0]:
        record = {
            "text": llm.text(trajectory),
            "latent_steps": [span.length for span in trajectory.spans],
            "stop_reason": trajectory.stop_reason,
            "num_tokens": len(trajectory.token_ids),
        }
        print(json.dumps(record, ensure_ascii=False))


if __name__ == "__main__":
    sys.exit(main())
