"""Can a job with these paths run on this cluster? `python -m grpo_latent.check_cluster --require FILE … --output-dir DIR`"""

from __future__ import annotations

import argparse
import sys

from rich.console import Console

from grpo_latent.errors import GrpoLatentError
from grpo_latent.verl_plugin.boot.cluster import check_cluster


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--require", nargs="*", default=[], metavar="FILE", help="files and folders that the job reads")
    parser.add_argument("--output-dir", help="folder that the job writes to")
    args = parser.parse_args(argv)
    console = Console()
    try:
        reports = check_cluster(args.require, args.output_dir)
    except GrpoLatentError as error:
        console.print(f"[red]{type(error).__name__}[/red]: {error}", markup=True, highlight=False)
        return 1
    for report in reports:
        console.print(f"{report.node}: Python {report.python}, grpo_latent {report.version}: ready", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
