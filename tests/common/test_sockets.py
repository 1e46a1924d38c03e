"""Temporary folders that are too long for a socket's path."""

import pytest

from grpo_latent.common.sockets import check_ray_folder
from grpo_latent.errors import ConfigError

TOO_LONG = "too long a folder for Ray's sockets; got .* 44 bytes; expected at most 43"


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
def test_rays_folder_has_room_for_a_sockets_path(name, monkeypatch):
    """107 bytes, of which `/session_<date and time>_<7 digits>/sockets/plasma_store` takes 64."""
    monkeypatch.setenv("TMPDIR", "/tmp")
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    check_ray_folder(None)
    monkeypatch.setenv(name, "/" + 38 * "a")
    check_ray_folder(None)
    monkeypatch.setenv(name, "/" + 39 * "a")
    with pytest.raises(ConfigError, match=f"^{name}: {TOO_LONG}"):
        check_ray_folder(None)
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    check_ray_folder(None)


def test_a_given_folder_is_measured_as_it_is():
    check_ray_folder("/" + 42 * "a")
    with pytest.raises(ConfigError, match=f"^ray_kwargs.ray_init._temp_dir: {TOO_LONG}"):
        check_ray_folder("/" + 43 * "a")
