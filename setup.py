from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

setup(
    name="grpo_latent",
    version="0.1.0",
    description="GRPO over latent trajectories: an RL research toolkit on verl and Ray",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=find_packages(include=["grpo_latent", "grpo_latent.*", "reward", "reward.*"]),
    package_data={
        "grpo_latent": ["py.typed"],
        "grpo_latent.config": ["*.yaml", "*/*.yaml"],
        "grpo_latent.inspect": ["assets/*"],
    },
    # requirements/ pins whole tested sets for CPU and CUDA; these are the ranges that the code
    # supports. The upper bound of torch is exact so that an installed or local CPU build of 2.13.0
    # satisfies it and pip fetches no CUDA build.
    install_requires=[
        "torch>=2.11,<=2.13.0",
        "transformers>=5.9,<5.18",
        "numpy>=2",
        "safetensors",
        "pillow",
        "rich",
        "hydra-core>=1.3",
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
            "qwen-vl-utils",
            "av",
        ],
        "sft": ["accelerate", "datasets", "peft"],
        "reward": ["math-verify"],
        "vllm": [
            "vllm==0.24.0"
        ],  # the CUDA build, as verl 0.9.1 pins it; `make vllm` adds the CPU build
        "embedded": ["scikit-learn", "matplotlib", "pyarrow", "pandas"],
        "inspect": ["plotly>=6", "jinja2", "pyarrow"],
        "dev": ["pytest", "pytest-xdist", "hypothesis", "ruff", "mypy==2.4.1", "selenium"],
    },
    entry_points={"verl.plugins": ["grpo_latent = grpo_latent.verl_plugin"]},
)
