import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"', (ROOT / "grpo_latent" / "__init__.py").read_text(), re.MULTILINE
)[1]
# what `grpo-latent init` copies; in the repository it lies at the top, in a wheel in the package
SHIPPED = ("recipes", "reward")


class BuildWithRecipes(build_py):
    """Puts recipes and reward files into the wheel, as data of the package."""

    def run(self):
        super().run()
        if self.editable_mode:  # the repository itself is read
            return
        for name in SHIPPED:
            target = Path(self.build_lib, "grpo_latent", "shipped", name)
            shutil.rmtree(target, ignore_errors=True)  # a build before this one
            ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
            shutil.copytree(ROOT / name, target, ignore=ignored)


setup(
    name="grpo_latent",
    version=VERSION,
    description="GRPO over latent trajectories: an RL research toolkit on verl and Ray",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    author="grpo_latent authors",
    project_urls={  # the repository itself has no public address yet
        "LVR": "https://arxiv.org/abs/2509.24251",
        "ILVR": "https://arxiv.org/abs/2512.05665",
        "IVT-LR": "https://arxiv.org/abs/2510.12603",
        "verl": "https://github.com/volcengine/verl",
    },
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.11",
    cmdclass={"build_py": BuildWithRecipes},
    packages=find_packages(include=["grpo_latent", "grpo_latent.*", "reward", "reward.*"]),
    package_data={
        "grpo_latent": ["py.typed"],
        "grpo_latent.config": ["*.yaml", "*/*.yaml"],
        "grpo_latent.inspect": ["assets/*"],
    },
    # requirements/ pins whole sets for CPU (the tests run on it, with Python 3.11) and CUDA. `make
    # versions` tests each bound here that the CPU set does not have; of verl 0.9 there is 0.9.1
    # alone. What has no bound is tested at the pinned version only. The upper bound of torch is
    # exact so that an installed or local CPU build of 2.13.0 satisfies it and pip fetches no CUDA
    # build. verl 0.9.1 wants transformers < 5.11; from 5.13 on engine hf's cache lacks an abstract
    # method.
    install_requires=[
        "torch>=2.11,<=2.13.0",
        "transformers>=5.9,<5.11",
        "numpy>=2.0.2",
        "safetensors",
        "pillow",
        "pyarrow",
        "packaging",
        "rich",
        "hydra-core>=1.3.2",
    ],
    extras_require={
        "rl": [
            "verl>=0.9.1,<0.10",
            "TransferQueue==0.1.11",
            "ray[default]>=2.50",
            "wandb",
            "tensorboard",
            "uvicorn",
            "fastapi",
            "cachetools",
            "psutil",
            "qwen-vl-utils",
            "av",
        ],
        "sft": ["accelerate", "datasets", "peft"],
        "reward": ["math-verify"],
        # the CUDA build: 0.24.0 is verl 0.9.1's own pin, 0.32 wants a transformers that verl refuses;
        # docs/vllm.md says what was run. `make vllm` adds the CPU build
        "vllm": ["vllm>=0.24.0,<0.32"],
        "embedded": ["scikit-learn", "matplotlib", "pandas"],
        "inspect": ["plotly>=6", "jinja2"],
        "dev": [
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "ruff==0.17.5",
            "mypy==2.4.1",
            "selenium",
            "pre-commit",
            "mkdocs-material==9.8.1",
            "mkdocstrings-python==2.0.11",
        ],
    },
    entry_points={
        "console_scripts": ["grpo-latent = grpo_latent.cli:main"],
        "verl.plugins": ["grpo_latent = grpo_latent.verl_plugin"],
        "lmms_eval.models": ["grpo_latent = grpo_latent.harnesses.lmms_eval_entry:manifest"],
    },
)
