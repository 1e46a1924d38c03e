"""What this package uses of transformers is still there; a failure names the symbol that changed.

`make versions` runs this at the floor of setup.py's range, and with 5.13, which renames a method of
its caches: that is to be named. The range ends before, at 5.11, where verl 0.9.1's does.
"""

import pytest
import transformers
from packaging.version import Version

from grpo_latent.common.seams import Seam
from grpo_latent.errors import PluginError
from grpo_latent.models.seams import SEAMS

HAS_CHANGED = Version(transformers.__version__) >= Version("5.13")


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: seam.name)
@pytest.mark.skipif(HAS_CHANGED, reason=f"transformers {transformers.__version__}")
def test_seam(seam):
    seam.check()


@pytest.mark.skipif(not HAS_CHANGED, reason="a release that has not changed")
def test_a_release_that_changed_is_named():
    with pytest.raises(
        PluginError, match="transformers changed under rollout's cache.*get_max_length"
    ):
        for seam in SEAMS:
            seam.check()


def test_another_abstract_method_is_named():
    symbol = "transformers.cache_utils:CacheLayerMixin"
    seam = Seam("some cache", symbol, "it is subclassed", abstract=frozenset({"update"}))
    with pytest.raises(PluginError, match="CacheLayerMixin: transformers changed .*get_seq"):
        seam.check()
