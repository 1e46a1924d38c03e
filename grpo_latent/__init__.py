"""GRPO over latent trajectories, on verl and Ray."""

__version__ = "0.2.0"
