"""Puts this folder on sys.path, so that the rooms below share its helper modules."""

import pytest
from record_cases import PNG


@pytest.fixture
def folder(tmp_path):
    """With an image that the records name, and one that is none."""
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "bad.png").write_bytes(b"\x89PNG nonsense")
    return tmp_path
