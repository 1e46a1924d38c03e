"""`python -m grpo_latent.check_cluster`: can a job with these paths run on this cluster?

Usage: `--require FILE … --output-dir DIR`, on the cluster itself.
"""

from __future__ import annotations

import argparse
import sys

from rich.console import Console

from grpo_latent.common.command import command
from grpo_latent.verl_plugin.boot.cluster import check_cluster


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--require",
        nargs="*",
        default=[],
        metavar="FILE",
        help="files and folders that the job reads",
    )
    parser.add_argument("--output-dir", help="folder that the job writes to")
    args = parser.parse_args(argv)
    console = Console()
    for report in check_cluster(args.require, args.output_dir):
        console.print(
            f"{report.node}: Python {report.python}, grpo_latent {report.version}: ready",
            highlight=False,
            soft_wrap=True,
        )


if __name__ == "__main__":
    sys.exit(main())
