"""GRPO over latent trajectories, on verl and Ray."""

__version__ = "0.1.0"
