"""The collector while a process imports, and after, each in a process of its own."""

import subprocess
import sys


def collector_after(call):
    """Thresholds, and whether an object made before it is left out of collections."""
    code = (
        "import gc\n"
        "from grpo_latent.common import collector\n"
        "made = [[] for _ in range(100_000)]\n"
        f"collector.{call}()\n"
        "print(gc.get_threshold(), gc.get_freeze_count() > 100_000)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_imports_are_collected_rarely_and_then_no_more():
    default = collector_after("forget_imports").rpartition(" ")[0]
    assert collector_after("collect_rarely") == "(50000, 20, 100) False"
    assert default != "(50000, 20, 100)"
    assert collector_after("collect_rarely(); collector.forget_imports") == f"{default} True"


def test_ray_finds_the_hook_by_its_name():
    """`ray_arguments` names it; Ray imports it before anything else of a worker's."""
    code = (
        "import sys\n"
        "from ray._common.utils import load_class\n"
        "before = set(sys.modules)\n"
        "load_class('grpo_latent.common.collector.collect_rarely')()\n"
        "print('torch' in set(sys.modules) - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
