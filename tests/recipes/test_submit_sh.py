"""Each recipe's submit.sh up to `ray job submit`, which a script plays.

It writes down what it is asked.
"""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "recipes").glob("*/submit.sh"))
INPUTS = {
    "MODEL": "/abs/model",
    "TRAIN": "/abs/train.parquet",
    "VAL": "/abs/val.parquet",
    "OUT": "/abs/out",
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.parent.name)
def test_preflight_then_the_recipes_own_config(script, tmp_path):
    ray = tmp_path / "ray"
    ray.write_text('#!/usr/bin/env bash\necho "$*" >> "$LOG"\n')
    ray.chmod(0o755)
    log, path = tmp_path / "log", f"{tmp_path}:{os.environ['PATH']}"
    env = {"PATH": path, "LOG": str(log), "RAY_API_SERVER_ADDRESS": "http://head:8265", **INPUTS}
    subprocess.run(["bash", script, "trainer.nnodes=2"], env=env, check=True, timeout=60)
    preflight, train = log.read_text().splitlines()
    assert (
        "check_cluster --require /abs/model /abs/train.parquet /abs/val.parquet "
        "--output-dir /abs/out" in preflight
    )
    words = train.split()
    folder, name = words[words.index("--config-dir") + 1], words[words.index("--config-name") + 1]
    assert folder == f"recipes/{script.parent.name}" and (ROOT / folder / f"{name}.yaml").is_file()
    assert words[-1] == "trainer.nnodes=2" and "latent.output_dir=/abs/out" in words


def test_every_recipe_with_a_config_for_gpus_has_one():
    configs = (ROOT / "recipes").glob("*/*_grpo.yaml"), (ROOT / "recipes").glob("*/*_vlpo.yaml")
    on_gpus = {
        path.parent for paths in configs for path in paths if "device: cuda" in path.read_text()
    }
    assert (
        on_gpus == {script.parent for script in SCRIPTS} - {ROOT / "recipes/quickstart"}
        and len(on_gpus) == 5
    )
