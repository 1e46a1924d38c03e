"""README and docs/ name what exists: links, files, commands, config keys; code blocks compile.

Does not cover: that commands do what the text says; the tests of each part do.
"""

import ast
import functools
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

import grpo_latent.train  # noqa: F401  lets hydra find verl's configs
from grpo_latent import errors
from grpo_latent.cli import COMMANDS
from grpo_latent.data.files import iter_verl_rows
from grpo_latent.data.rows import check_prompt

REPOSITORY = Path(__file__).parents[2]
PAGES = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((REPOSITORY / "docs").glob("*.md")),
    *sorted((REPOSITORY / "recipes").glob("*/README.md")),
]
METHODS = ("lvr", "ilvr_stage1", "ilvr_stage2", "ivt_lr", "coconut")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
FILE = re.compile(r"^[\w.{},*/-]+/[\w.{},*-]+\.(?:py|sh|yaml|md|txt|json|jsonl|png|svg|cff)$")
KEY = re.compile(r"^\+?((?:latent|actor_rollout_ref|algorithm|trainer|data|loss|model)\.[\w.]+)=")
# pages write a placeholder in their place: files of a user, of a run, of a checkpoint
USERS_OWN = re.compile(r"^(my_|outputs/|checkpoints/|sft/|results/)|global_step|<")


@pytest.fixture(params=PAGES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def page(request):
    return request.param


def prose(text):
    return FENCE.sub("", text)


def blocks(path, *languages):
    return [body for language, body in FENCE.findall(path.read_text()) if language in languages]


def anchors(path):
    titles = re.findall(r"^#+ (.+)$", prose(path.read_text()), re.MULTILINE)
    kept = [re.sub(r"[^\w\s-]", "", title.lower()).strip() for title in titles]
    return {re.sub(r"[\s]+", "-", title) for title in kept}


def test_links_resolve(page):
    for target in LINK.findall(prose(page.read_text())):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), target


def test_pages_of_the_site_link_within_it():
    """mkdocs serves docs/ only."""
    docs = REPOSITORY / "docs"
    for path in docs.glob("*.md"):
        for target in LINK.findall(prose(path.read_text())):
            if not target.startswith("http") and target.partition("#")[0]:
                assert docs in (path.parent / target.partition("#")[0]).resolve().parents, target


def test_every_page_is_in_the_navigation():
    config = (REPOSITORY / "mkdocs.yml").read_text()
    named = set(re.findall(r"[\w]+\.md", config))
    assert named == {path.name for path in (REPOSITORY / "docs").glob("*.md")}


def test_named_files_exist(page):
    roots = (REPOSITORY, REPOSITORY / "grpo_latent", REPOSITORY / "docs", page.parent)
    for text in CODE.findall(prose(page.read_text())):
        name = text.split(":")[0].split(" ")[0]
        if not FILE.match(name) or USERS_OWN.search(name):
            continue
        for each in expand(name):
            assert any(list(root.glob(each)) for root in roots), text


def expand(name):
    """`{a,b}/c` as a shell would have it."""
    found = re.search(r"\{([^}]*)\}", name)
    if found is None:
        return [name]
    head, tail = name[: found.start()], name[found.end() :]
    return [each for part in found.group(1).split(",") for each in expand(f"{head}{part}{tail}")]


def commands(path):
    """Lines of shell, continued ones joined."""
    text = "\n".join([*blocks(path, "bash"), *CODE.findall(prose(path.read_text()))])
    return re.sub(r"\\\n\s*", " ", text).splitlines()


def test_named_commands_exist(page):
    makefile = (REPOSITORY / "Makefile").read_text()
    for line in commands(page):
        for module in re.findall(r"python -m (grpo_latent(?:\.\w+)*)", line):
            assert importlib.util.find_spec(module) is not None, line
        for name in re.findall(r"(?:^|\s|/)grpo-latent ([a-z][\w-]*)", line):
            assert name in COMMANDS or name == "COMMAND", line
        for target in re.findall(r"^\s*make ([a-z][\w-]*)", line):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), line
        for script in re.findall(
            r"(?:bash|python) ((?:recipes|benchmarks|docs)/[\w./*${}-]+)", line
        ):
            if not re.search(r"[*$]", script):
                assert (REPOSITORY / script).exists(), line


@functools.cache
def configs():
    """All that a documented key may belong to."""
    with initialize_config_module("grpo_latent.config", version_base=None):
        found = [compose("grpo"), compose("evaluate")]
        found += [compose("sft", [f"method={method}"]) for method in METHODS]
    return found


def has_key(key):
    parent, _, name = key.rpartition(".")
    for config in configs():
        node = OmegaConf.select(config, parent, throw_on_missing=False)
        # `settings` and `options` take what a mechanism or treatment of one's own declares
        # `in` passes over values that a user must give
        if OmegaConf.is_dict(node) and (
            name in list(node) or parent.endswith(("options", "settings"))
        ):
            return True
    return False


def test_named_config_keys_exist(page):
    for line in commands(page):
        for word in line.split():
            found = KEY.match(word.strip("'\""))
            if found:
                assert has_key(found.group(1)), f"{found.group(1)} in {line}"


def test_a_misspelt_key_is_found():
    assert has_key("latent.alarm.stop") and not has_key("latent.alarm.stopp")
    assert has_key("loss.steps_per_stage") and has_key("latent.treatment.options.mine")


def test_each_error_is_found_by_its_name_with_a_remedy():
    text = (REPOSITORY / "docs" / "troubleshooting.md").read_text()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| `")]
    helped = {name for row in rows if len(row) == 3 for name in re.findall(r"`(\w+)", row[0])}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    raised = {kind.__name__ for kind in kinds if issubclass(kind, errors.GrpoLatentError)}
    assert raised - helped == {"GrpoLatentError"}, "the base, which is not raised itself"


def test_python_blocks_compile(page):
    for body in blocks(page, "python"):
        ast.parse(body)


def test_the_documented_recipe_composes(tmp_path):
    (body,) = blocks(REPOSITORY / "docs" / "own_run.md", "yaml")
    (tmp_path / "my_grpo.yaml").write_text(body)
    done = subprocess.run(
        [sys.executable, "-m", "grpo_latent.train", "--config-dir", str(tmp_path)]
        + ["--config-name", "my_grpo", "--cfg", "job"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "tolerance: 0.01" in done.stdout and "kl_loss_coef: 0.05" in done.stdout


def test_the_documented_row_is_read(tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (28, 28)).save("a.png")
    (body,) = blocks(REPOSITORY / "docs" / "data.md", "python")
    exec(compile(body, "docs/data.md", "exec"), {})
    ((row, where),) = iter_verl_rows("train.parquet")
    messages, images = check_prompt(row, where)
    assert [part["type"] for part in messages[0]["content"]] == ["text", "image"]
    assert len(images) == 1 and row["extra_info"]["index"] == 0


def test_readme_is_short_and_its_reward_is_right():
    text = (REPOSITORY / "README.md").read_text()
    assert len(text.splitlines()) <= 130
    names: dict = {}
    exec(blocks(REPOSITORY / "README.md", "python")[0], names)
    assert names["compute_score"]("mine", "it is 7", "7") == {"score": 1.0, "length": 7}


def test_pictures_are_drawn_by_their_script(tmp_path):
    """The committed drawings are what docs/pictures/draw.py makes."""
    source = REPOSITORY / "docs" / "pictures"
    (tmp_path / "draw.py").write_text((source / "draw.py").read_text())
    subprocess.run([sys.executable, str(tmp_path / "draw.py")], check=True, timeout=60)
    for path in tmp_path.glob("*.svg"):
        assert path.read_text() == (source / path.name).read_text(), path.name
