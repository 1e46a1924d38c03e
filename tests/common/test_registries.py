"""One form for mechanisms, treatments, backbones and benchmarks: a new file is all that is added."""

import importlib
import sys

import pytest

from grpo_latent.common.registry import Registry, import_folder, instance_of, subclass_of
from grpo_latent.errors import ConfigError

# package -> (its registry, a file that adds one thing of the name "added")
ADDED = {
    "grpo_latent.latent.mechanisms": (
        "MECHANISMS",
        "from grpo_latent.latent.mechanisms.coconut import Coconut\n"
        "from grpo_latent.latent.mechanisms.registry import register\n"
        "@register\n"
        "class Added(Coconut):\n"
        "    name = 'added'\n",
    ),
    "grpo_latent.latent.treatments": (
        "TREATMENTS",
        "from grpo_latent.latent.treatments.mask import Mask\n"
        "from grpo_latent.latent.treatments.registry import register\n"
        "@register\n"
        "class Added(Mask):\n"
        "    name = 'added'\n",
    ),
    "grpo_latent.backbones": (
        "BACKBONES",
        "from grpo_latent.backbones.registry import register\n"
        "from grpo_latent.backbones.text import TextBackbone\n"
        "@register\n"
        "class Added(TextBackbone):\n"
        "    model_types = ('added',)\n",
    ),
    "grpo_latent.eval.benchmarks": (
        "BENCHMARKS",
        "from grpo_latent.eval.benchmarks.protocol import Benchmark\n"
        "from grpo_latent.eval.benchmarks.registry import register\n"
        "Added = register(Benchmark('added', 'a pencil', ('a.jsonl',), ('q',), parse=print))\n",
    ),
}


@pytest.mark.parametrize("package", ADDED)
def test_a_new_file_in_the_folder_is_found_by_its_name(package, tmp_path, monkeypatch):
    name, source = ADDED[package]
    registry = importlib.import_module(f"{package}.registry")
    things = getattr(registry, name)
    assert isinstance(things, Registry) and registry.register == things.register
    (tmp_path / "added_file.py").write_text(source)
    module = importlib.import_module(package)
    monkeypatch.setattr(module, "__path__", [*module.__path__, str(tmp_path)])
    try:
        import_folder(package, module.__path__)
        added = sys.modules[f"{package}.added_file"].Added
        assert things.find("added", "some.key") is added
        assert things.imported(f"{package}.added_file:Added", "some.key") is added
    finally:
        things.pop("added", None)
        sys.modules.pop(f"{package}.added_file", None)
        vars(module).pop("added_file", None)


class Animal:
    name = ""


class Cat(Animal):
    name = "cat"


class Dog(Animal):
    def __init__(self, breed):
        self.breed = breed


TOM = Cat()


def animals():
    kinds = Registry("cat", subclass_of(Animal), lambda cls: (cls.name,))
    kinds.register(Cat)
    return kinds


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("cow", r"zoo.animal: unknown cat; got cow; expected one of \['cat'\]"),
        (None, "unknown cat"),
        (["cat"], "unknown cat"),
        (f"{__name__}:Cow", "cannot import the cat; .*Cow"),
        ("nowhere_at_all:Cat", "cannot import the cat; .*nowhere_at_all"),
        (":Cat", "cannot import the cat"),
        (f"{__name__}:TOM", "not a cat; .*a Cat;"),
        (f"{__name__}:pytest", "not a cat"),
    ],
)
def test_what_is_not_there_is_refused(name, problem):
    with pytest.raises(ConfigError, match=problem):
        animals().find(name, "zoo.animal")


def test_a_name_belongs_to_one():
    kinds = animals()
    assert kinds.register(Cat) is Cat
    with pytest.raises(ConfigError, match="two cats of one name; got cat of .*Other"):

        @kinds.register
        class Other(Cat):
            pass

    with pytest.raises(ConfigError, match="without a name.*Dog"):
        kinds.register(Dog)


def test_an_object_is_given_or_made_once():
    pets = Registry("pet", instance_of(Animal), lambda pet: (pet.name,))
    assert pets.find(f"{__name__}:TOM", "pet") is TOM
    made = pets.find(f"{__name__}:Cat", "pet")
    assert type(made) is Cat and made is pets.find(f"{__name__}:Cat", "pet")
    with pytest.raises(ConfigError, match="cannot import the pet.*breed"):
        pets.find(f"{__name__}:Dog", "pet")
