"""Starts vLLM's own OpenAI-compatible server, latents on.

    python -m grpo_latent.serve FOLDER [flags of vllm serve …]

Checks the checkpoint, then becomes `vllm serve FOLDER` with the flags that latents need.
`--print-command` prints that command instead, to be run or changed by hand; vLLM's worker checks
it again. Without `--host` it listens on loopback only.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from pathlib import Path

from grpo_latent.common.arguments import check_arguments
from grpo_latent.common.command import add_verify_digests, command
from grpo_latent.common.kinds import null_or, whole
from grpo_latent.common.listeners import LOOPBACK
from grpo_latent.common.manifest import check_whole
from grpo_latent.errors import ConfigError
from grpo_latent.rollout.vllm.skeleton import CONFIG_KEY, Skeleton, WorkerOptions, read_skeleton
from grpo_latent.rollout.vllm.supported import (
    RUNNER_VARIABLE,
    SCHEDULER_CLASSES,
    WORKER_CLASSES,
    check_installed,
    pin_runner,
)

CLI = "grpo_latent.rollout.vllm.cli"
MIDDLEWARE = "grpo_latent.rollout.vllm.middleware.LatentRequests"


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Our own arguments, and those that are passed on to vLLM, which checks them.

    Raises:
        ConfigError: one of ours is out of range.
    """
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # --m could be a flag of vLLM's
    )
    parser.add_argument("model", help="folder of a latent checkpoint")
    parser.add_argument(
        "--steps", type=int, help="latent steps a span; the checkpoint's if left out"
    )
    parser.add_argument(
        "--max-latents",
        type=int,
        help="latent steps that a completion may hold (default: 256, or more for max_spans)",
    )
    parser.add_argument(
        "--print-command", action="store_true", help="print vLLM's command and stop"
    )
    add_verify_digests(parser)
    args, flags = parser.parse_known_args(argv)
    check_arguments(args, steps=null_or(whole(0)), max_latents=null_or(whole(1)))
    return args, flags


def vllm_command(
    skeleton: Skeleton,
    model: str,
    platform: str,
    flags: list[str],
    overrides: dict,
    max_latents: int | None,
) -> list[str]:
    """Arguments of `vllm`. Flags of the user come last, so that they win.

    Args:
        platform: `cpu` or `cuda`.
        flags: the user's own, passed on.
        overrides: settings of the mechanism to replace.
    """
    WorkerOptions(skeleton.mechanism, (), max_latents)  # refuses what the worker would
    # vLLM also takes --additional_config and --additional-config.grpo_latent.max_latents=9
    names = {flag.split("=")[0].split(".")[0].replace("_", "-") for flag in flags}
    # vLLM schedules asynchronously on GPUs unless told otherwise, never on CPU
    is_async = platform == "cuda" and "--no-async-scheduling" not in names
    command = [
        "serve",
        model,
        "--worker-cls",
        WORKER_CLASSES[platform],
        "--scheduler-cls",
        SCHEDULER_CLASSES[is_async],
    ]
    command += [
        "--async-scheduling" if is_async else "--no-async-scheduling",
        "--middleware",
        MIDDLEWARE,
    ]
    if skeleton.adapter.has_vision and "--limit-mm-per-prompt" not in names:
        command += ["--limit-mm-per-prompt", json.dumps({"video": 0})]
    if skeleton.adapter.has_vision and "--mm-processor-cache-gb" not in names:
        # a request that vLLM refuses after it has read the image leaves the cache's two halves at
        # odds: 500 from then on
        command += ["--mm-processor-cache-gb", "0"]
    if "--host" not in names:
        command += ["--host", LOOPBACK]
    options = ({"overrides": overrides} if overrides else {}) | (
        {} if max_latents is None else {"max_latents": max_latents}
    )
    if options and "--additional-config" in names:
        raise ConfigError(
            "two places for the same options",
            where="--additional-config",
            got=f"also {sorted(options)}",
            expected="either",
            fix=f'Put them under "{CONFIG_KEY}" of --additional-config.',
        )
    if options:
        command += ["--additional-config", json.dumps({CONFIG_KEY: options})]
    return command + flags


@command
def main(argv: list[str] | None = None) -> None:
    """Becomes vLLM's server, or prints how."""
    args, flags = parse(argv)
    _, platform = check_installed()
    overrides = {} if args.steps is None else {"steps": args.steps}
    if Path(args.model).is_dir():
        check_whole(args.model, args.verify_digests)
    skeleton = read_skeleton(args.model, overrides)
    arguments = vllm_command(skeleton, args.model, platform, flags, overrides, args.max_latents)
    is_v2 = pin_runner()
    if not any(flag.split("=")[0] == "--host" for flag in flags):
        os.environ.setdefault("VLLM_HOST_IP", LOOPBACK)  # of vLLM's collectives
    if args.print_command:
        program = "vllm" if platform == "cuda" else f"python -m {CLI}"
        print(f"{RUNNER_VARIABLE}={int(is_v2)} {program} {shlex.join(arguments)}")
        return
    # this process, not a child: signals and the exit code are the server's
    os.execv(sys.executable, [sys.executable, "-m", CLI, *arguments])


if __name__ == "__main__":
    sys.exit(main())
