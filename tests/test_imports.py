"""Imports point one way; read from the AST, function-level ones too.

Not covered: `importlib.import_module(name)`.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "grpo_latent"

# layer -> layers of grpo_latent that it may import, itself aside. `entry` is every module at the
# top of the package that has no row of its own: `python -m grpo_latent.<entry>`.
_BASE = {"errors", "common"}
_TYPES = _BASE | {"recorded_fields", "trajectory"}
_CORE = _TYPES | {"latent", "algo"}
_MODELS = _CORE | {"backbones", "models"}
ALLOWED = {
    "errors": set(),
    "common": {"errors"},  # atomic writes, strict settings, the command wrapper, dtype names
    "answers": _BASE,  # when two answers are one: rewards and graders both ask
    "recorded_fields": _BASE,
    "trajectory": _BASE | {"recorded_fields"},
    "algo": _TYPES,
    "latent": _TYPES | {"algo"},  # a density's maths
    "rewards": _TYPES,  # runs a user's function in a process of its own: needs no model
    "backbones": _TYPES,  # what a family of models is: no latents
    "models": _CORE | {"backbones"},
    "torchvision_ops": set(),  # declares operator schemas so that torchvision imports beside a CPU torch
    "rollout": _MODELS | {"torchvision_ops"},
    "data": _MODELS,  # rows, and the tiny models' vision pretraining
    "sft": _MODELS | {"data"},
    "eval": _MODELS | {"answers", "data", "rewards", "rollout"},
    "inspect": _MODELS | {"data", "rewards", "rollout", "eval"},
    "harnesses": _MODELS | {"data", "rollout"},  # models of lmms-eval and VLMEvalKit
    "testing": _MODELS | {"rollout", "eval"},  # checks that users run on their own plug-ins
    # the page of a run, for wandb; torchvision, which vLLM imports
    "verl_plugin": _MODELS | {"data", "rewards", "rollout", "eval", "inspect", "torchvision_ops"},
    "config": set(),
    "entry": _MODELS
    | {"data", "rewards", "rollout", "sft", "eval", "inspect", "verl_plugin", "config", "testing"},
}
# package -> its rooms in order; a module imports its own room and earlier ones, rooms in one pair
# of brackets not each other
ROOMS = {
    "data": (
        ("boxes", "image_refs"),
        ("examples", "files"),
        ("rows",),
        ("checks",),
        ("formats", "embedded"),
    ),
    "sft": (
        ("common",),
        ("lvr", "ilvr", "stepwise"),
        ("methods",),
        ("settings",),
        ("resuming",),
        ("run",),
        ("__main__",),
    ),
    "verl_plugin": (("boot",), ("rewards",), ("rollout",), ("worker",), ("trainer",)),
}
# third-party root -> modules that may import it: the plug-in, the entry point that starts verl's
# trainer, engine `vllm`
_PLUGIN = ("grpo_latent.verl_plugin", "grpo_latent.train")
ONLY_IN = {
    **dict.fromkeys(("ray", "verl", "tensordict", "transfer_queue"), _PLUGIN),
    "vllm": ("grpo_latent.rollout.vllm", "grpo_latent.verl_plugin"),
}
FORBIDDEN_EVERYWHERE = {"recipes", "reward", "tests", "benchmarks"}


def layer_of(module: str) -> str:
    """`grpo_latent.models.tiny` -> models; `grpo_latent.evaluate` -> entry."""
    parts = module.split(".")
    name = parts[1] if len(parts) > 1 else ""
    return name if name in ALLOWED else "entry"


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or path.is_dir()


def imported_modules(source: str, module: str, is_package: bool = False) -> set[str]:
    """Absolute names of all modules that `source` imports.

    `from package import name` counts `package.name` if a module.
    """
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            parent = parts[: len(parts) - node.level + is_package] if node.level else []
            base = ".".join([*parent, *([node.module] if node.module else [])])
            for alias in node.names:
                child = f"{base}.{alias.name}"
                names.add(child if is_module(child) else base)
    return names


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    layer, found = layer_of(module), []
    for name in sorted(imported_modules(source, module, is_package)):
        root = name.split(".")[0]
        if root == "grpo_latent" and name != "grpo_latent":
            target = layer_of(name)
            if target != layer and target not in ALLOWED[layer]:
                found.append(f"{module} ({layer}) imports {name} ({target})")
        elif root in FORBIDDEN_EVERYWHERE or not module.startswith(ONLY_IN.get(root, "")):
            found.append(f"{module} ({layer}) imports {name}")
    return found


def room_violations(source: str, module: str) -> list[str]:
    """Imports of a later room of the module's own package, or of its neighbour."""
    _, package, room, *_ = [*module.split("."), "", ""]
    order = {name: index for index, names in enumerate(ROOMS.get(package, ())) for name in names}
    found = []
    for name in sorted(imported_modules(source, module) if room else ()):
        _, target_package, target, *_ = [*name.split("."), "", ""]
        if (
            target_package == package
            and target
            and target != room
            and order[target] >= order[room]
        ):
            found.append(f"{module} imports {name}")
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_module_imports_lower_layers_only(path):
    if path == PACKAGE / "__init__.py":
        return
    assert violations(path.read_text(), module_name(path), path.name == "__init__.py") == []


def test_the_package_itself_imports_nothing_until_it_is_asked():
    """`import grpo_latent` must work, and be cheap, where only Python is installed."""
    ours = (PACKAGE / "__init__.py").read_text()
    assert imported_modules(ours, "grpo_latent", True) <= {"importlib", "typing"}
    code = """if True:
        import sys, grpo_latent
        assert "torch" not in sys.modules
        from grpo_latent import LatentLLM, SamplingParams
        assert LatentLLM.__module__ == "grpo_latent.rollout.llm"
        assert not hasattr(grpo_latent, "LatentLlm")
    """
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_every_package_has_a_row():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders <= set(ALLOWED), f"no row for {folders - set(ALLOWED)}"


def test_the_table_has_no_cycle():
    done = set()
    while len(done) < len(ALLOWED):
        free = {
            layer
            for layer, allowed in ALLOWED.items()
            if layer not in done and allowed - {layer} <= done
        }
        assert free, f"a cycle among {set(ALLOWED) - done}"
        done |= free


@pytest.mark.parametrize("package", ROOMS)
def test_rooms_of_a_package_import_earlier_ones_only(package):
    files = sorted((PACKAGE / package).rglob("*.py"))
    names = {
        path.relative_to(PACKAGE / package).parts[0].removesuffix(".py") for path in files
    } - {"__init__"}
    assert names == {name for names in ROOMS[package] for name in names}, (
        "each room has its place in the order"
    )
    assert [
        found for path in files for found in room_violations(path.read_text(), module_name(path))
    ] == []


def test_no_two_modules_import_each_other():
    imports = {
        module_name(path): imported_modules(
            path.read_text(), module_name(path), path.name == "__init__.py"
        )
        for path in FILES
    }
    while imports:
        free = {
            name for name, targets in imports.items() if not (targets - {name}) & imports.keys()
        }
        assert free, f"a circle among {sorted(imports)}"
        imports = {name: targets for name, targets in imports.items() if name not in free}


@pytest.mark.parametrize(
    "path", sorted((ROOT / "reward").glob("*.py")), ids=lambda path: path.name
)
def test_reward_functions_use_types_errors_and_answers_only(path):
    own = {
        name
        for name in imported_modules(path.read_text(), module_name(path))
        if name.startswith("grpo_latent")
    }
    assert own <= {"grpo_latent.errors", "grpo_latent.trajectory", "grpo_latent.answers"}


@pytest.mark.parametrize(
    ("module", "source", "num_violations"),
    [
        ("grpo_latent.latent.x", "from grpo_latent.models import tiny", 1),
        ("grpo_latent.latent.x", "def f():\n    import grpo_latent.models.tiny", 1),
        ("grpo_latent.latent.x", "from ..models.tiny import word_tokenizer", 1),
        ("grpo_latent.models.x", "from grpo_latent.latent.mechanisms import Mechanism", 0),
        ("grpo_latent.models.x", "from . import tiny", 0),
        ("grpo_latent.common.x", "from grpo_latent.trajectory import Trajectory", 1),
        ("grpo_latent.trajectory", "from grpo_latent.common.files import write_text", 0),
        ("grpo_latent.models.x", "import ray", 1),
        ("grpo_latent.rollout.hf", "from verl.utils import x", 1),
        ("grpo_latent.verl_plugin.x", "from verl.utils import x\nimport ray", 0),
        ("grpo_latent.train", "import verl", 0),
        ("grpo_latent.rollout.vllm.worker", "import vllm", 0),
        ("grpo_latent.rollout.vllm.worker", "import verl", 1),
        ("grpo_latent.rollout.hf", "import vllm", 1),
        ("grpo_latent.sft.x", "import verl", 1),
        ("grpo_latent.evaluate", "def f():\n    import ray", 1),
        ("grpo_latent.eval.x", "from grpo_latent.rollout.hf import HFRolloutEngine", 0),
        ("grpo_latent.eval.x", "from grpo_latent.verl_plugin import engine", 1),
        ("grpo_latent.evaluate", "from grpo_latent.eval import evaluate", 0),
        ("grpo_latent.eval.x", "from grpo_latent.evaluate import main", 1),
        ("grpo_latent.train", "from reward.digits import compute_score", 1),
        ("grpo_latent.train", "import recipes.quickstart", 1),
    ],
)
def test_the_rule_catches(module, source, num_violations):
    assert len(violations(source, module)) == num_violations


@pytest.mark.parametrize(
    ("module", "source", "num_violations"),
    [
        ("grpo_latent.sft.common.x", "from grpo_latent.sft.lvr.rows import LVRRow", 1),
        (
            "grpo_latent.sft.common.x",
            "if TYPE_CHECKING:\n    from grpo_latent.sft.settings import SFTSettings",
            1,
        ),
        ("grpo_latent.sft.ilvr.x", "from grpo_latent.sft.lvr.rows import LVRRow", 1),
        ("grpo_latent.sft.ilvr.x", "from grpo_latent.sft.ilvr.rows import ILVRRow", 0),
        ("grpo_latent.sft.ilvr.x", "from grpo_latent.sft.common.rows import IGNORED", 0),
        ("grpo_latent.sft.run", "from grpo_latent.sft.settings import SFTSettings", 0),
        ("grpo_latent.verl_plugin.boot.x", "from grpo_latent.verl_plugin.worker import engine", 1),
        (
            "grpo_latent.verl_plugin.rollout.x",
            "def f():\n    from grpo_latent.verl_plugin.trainer import trainer",
            1,
        ),
        (
            "grpo_latent.data.rows",
            "from grpo_latent.data.formats.lvr_json import LVRJsonDataset",
            1,
        ),
        ("grpo_latent.data.formats.x", "from grpo_latent.data.rows import write_verl_parquet", 0),
    ],
)
def test_the_rule_of_rooms_catches(module, source, num_violations):
    assert len(room_violations(source, module)) == num_violations


def test_no_two_test_files_share_a_name():
    """pytest imports a test file by its base name: two of one name are not collected together."""
    names = [path.name for path in sorted((ROOT / "tests").rglob("*.py"))]
    twice = {name for name in names if names.count(name) > 1}
    assert twice <= {"conftest.py"}
