"""The wheel, built and installed beside the environment's packages, away from the repository.

Every sub-command answers --help, `init` copies a recipe that composes, `doctor` says what is here.

Does not cover: pip's resolution of the requirements; `doctor` compares versions with them.
"""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from grpo_latent import __version__
from grpo_latent.cli import COMMANDS

REPOSITORY = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy: setuptools writes into the folder that it builds."""
    source = tmp_path_factory.mktemp("source")
    for name in ("grpo_latent", "recipes", "reward"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / name, source / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE", "MANIFEST.in"):
        shutil.copy(REPOSITORY / name, source / name)
    target = tmp_path_factory.mktemp("wheel")
    code = (
        "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1], {})"
    )
    run([sys.executable, "-c", code, str(target)], source)
    (path,) = target.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def scripts(wheel, tmp_path_factory):
    """Folder of the commands of a bare environment that sees this one's packages, ours excepted."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    run([sys.executable, "-m", "venv", "--without-pip", str(folder)], folder.parent)
    (packages,) = folder.glob("lib/python*/site-packages")
    run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        + ["--no-deps", "--no-index", "--prefix", str(folder), "--ignore-installed", str(wheel)],
        folder.parent,
    )
    assert (packages / "grpo_latent").is_dir()
    # behind its own packages, so that a grpo_latent installed there is not the one found
    (packages / "shared.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder / "bin"


def run(arguments, folder, code=0):
    """The output of a command started in `folder`, without what points to the repository."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"COLUMNS": "120"}
    done = subprocess.run(
        arguments, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_what_the_wheel_holds(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (archive.read(n).decode() for n in names if n.endswith("/METADATA"))
    for path in (
        "grpo_latent/config/grpo.yaml",
        "grpo_latent/config/method/lvr.yaml",
        "grpo_latent/inspect/assets/main.js",
        "grpo_latent/py.typed",
        "grpo_latent/shipped/recipes/quickstart/run.sh",
        "grpo_latent/shipped/recipes/common.sh",
        "grpo_latent/shipped/reward/accuracy.py",
    ):
        assert path in names, path
    assert any(name.endswith("licenses/LICENSE") or name.endswith("/LICENSE") for name in names)
    assert not [name for name in names if "__pycache__" in name or name.startswith("tests")]
    assert f"Version: {__version__}" in metadata and "# grpo_latent" in metadata
    assert re.search(r"^License(-Expression)?: Apache-2.0$", metadata, re.MULTILINE)


# one process for all: each imports torch
HELPS = """
from grpo_latent.cli import COMMANDS, main
for name in COMMANDS:
    print(f"== {name}", flush=True)
    try:
        main([name, "--help"])
    except SystemExit as end:
        assert not end.code, (name, end.code)
"""


def test_every_command_answers_help(scripts, tmp_path):
    text = run([str(scripts / "python"), "-c", HELPS], tmp_path)
    helps = dict(re.findall(r"== (\S+)\n(.*?)(?=\n== |\Z)", text, re.DOTALL))
    assert list(helps) == list(COMMANDS)
    for name, text in helps.items():
        assert "usage: " in text or "powered by Hydra" in text, (name, text)


def test_the_command_lists_its_table(scripts, tmp_path):
    program = [str(scripts / "python"), str(scripts / "grpo-latent")]
    listed = run([*program, "--help"], tmp_path)
    assert re.findall(r"^  (\S+)", listed, re.MULTILINE) == list(COMMANDS)
    refused = run([*program, "trian"], tmp_path, code=2)
    assert "ConfigError: grpo-latent: no such command; got trian" in refused


def test_init_and_doctor_from_another_folder(scripts, tmp_path):
    program = [str(scripts / "python"), str(scripts / "grpo-latent")]
    text = run([*program, "init", "quickstart", "work"], tmp_path)
    assert "next: bash work/recipes/quickstart/run.sh" in text
    for name in ("recipes/common.sh", "recipes/summarize.py", "reward/digits.py"):
        assert (tmp_path / "work" / name).read_bytes() == (REPOSITORY / name).read_bytes()
    run([*program, "init", "quickstart", "work"], tmp_path)  # nothing differs: nothing is lost
    configs = ["--config-dir", "work/recipes/quickstart", "--config-name", "digits_grpo"]
    assert "total_training_steps: 60" in run([*program, "train", *configs, "--cfg=job"], tmp_path)
    changed = tmp_path / "work" / "recipes" / "quickstart" / "run.sh"
    changed.write_text("mine")
    refused = run([*program, "init", "quickstart", "work"], tmp_path, code=2)
    assert "DataError" in refused and "a file that differs is in the way" in refused
    assert changed.read_text() == "mine"

    reward = tmp_path / "work" / "reward" / "format.py"
    assert "nothing wrong" in run([*program, "check-reward", str(reward)], tmp_path)
    version = importlib.metadata.version("transformers")
    text = run([*program, "doctor"], tmp_path)
    assert f"grpo_latent {__version__}" in text and f"transformers {version}" in text
    assert "no fault" in text
