"""What is said about the package in several files is one thing."""

import re
from pathlib import Path

import grpo_latent

REPOSITORY = Path(__file__).parents[2]


def read(name):
    return (REPOSITORY / name).read_text()


def pinned(text, name):
    """All versions that a text pins a package to."""
    return set(re.findall(rf"\b{name}==([\w.]+)", text))


def test_one_version():
    (cited,) = re.findall(r"^version: (.+)$", read("CITATION.cff"), re.MULTILINE)
    changes = re.findall(r"^## (\S+)", read("CHANGELOG.md"), re.MULTILINE)
    assert cited == changes[0] == grpo_latent.__version__
    assert "__version__" in read("setup.py") and grpo_latent.__version__ not in read("setup.py")


def test_linters_are_the_pinned_ones():
    (ruff,) = pinned(read("requirements/cpu.txt"), "ruff")
    (mypy,) = pinned(read("requirements/cpu.txt"), "mypy")
    assert pinned(read("setup.py"), "ruff") == {ruff}
    assert pinned(read("setup.py"), "mypy") == {mypy}
    assert pinned(read(".pre-commit-config.yaml"), "ruff") == {ruff}
    assert f"mypy ({mypy}," in read(".pre-commit-config.yaml")


def test_the_licence_is_whole():
    text = read("LICENSE")
    assert text.startswith(" " * 33 + "Apache License") or text.startswith("Apache License")
    for section in range(1, 10):
        assert f"{section}. " in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert "license: Apache-2.0" in read("CITATION.cff")
    assert 'license="Apache-2.0"' in read("setup.py")
