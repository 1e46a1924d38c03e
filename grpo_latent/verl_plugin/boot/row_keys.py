"""Names of a group's trajectories in TransferQueue: `<group>_<session>_<output>`, as in verl."""

from __future__ import annotations


def trajectory_key(group: str, session: int) -> str:
    """The key of a group's trajectory by its index in the group.

    >>> group_of(trajectory_key("an_id", 3))
    'an_id'
    """
    return f"{group}_{session}_0"


def group_of(key: str) -> str:
    """The group of a trajectory's key."""
    return key.rsplit("_", 2)[0]
