"""What this package uses of transformers is still there; a failure names the symbol that changed.

`make versions` runs this at both ends of setup.py's range, and one release beyond it, which is to
be named.
"""

import re
from pathlib import Path

import pytest
import transformers
from packaging.requirements import Requirement
from packaging.version import Version

from grpo_latent.common.seams import Seam
from grpo_latent.errors import PluginError
from grpo_latent.models.seams import SEAMS

SETUP = Path(__file__).parents[2] / "setup.py"
(RANGE,) = re.findall(r'"transformers(.+)"', SETUP.read_text())
IS_WITHIN = Version(transformers.__version__) in Requirement(f"transformers{RANGE}").specifier


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: seam.name)
@pytest.mark.skipif(not IS_WITHIN, reason=f"transformers {transformers.__version__}")
def test_seam(seam):
    seam.check()


@pytest.mark.skipif(IS_WITHIN, reason="a release within the range")
def test_a_release_beyond_the_range_is_named():
    with pytest.raises(PluginError, match="transformers changed under"):
        for seam in SEAMS:
            seam.check()


def test_another_abstract_method_is_named():
    symbol = "transformers.cache_utils:CacheLayerMixin"
    seam = Seam("some cache", symbol, "it is subclassed", abstract=frozenset({"update"}))
    with pytest.raises(PluginError, match="CacheLayerMixin: transformers changed .*get_seq"):
        seam.check()
