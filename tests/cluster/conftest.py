"""Cluster tests are left out unless asked for: they take minutes."""

import os

import pytest


def pytest_collection_modifyitems(items):
    if os.environ.get("GRPO_LATENT_CLUSTER"):
        return
    for item in items:
        if item.path.parent.name == "cluster":
            item.add_marker(
                pytest.mark.skip(reason="of a cluster: make test-cluster, make test-long")
            )
