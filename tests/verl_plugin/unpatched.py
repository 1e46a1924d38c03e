"""Takes back what verl does to transformers in this process."""

import importlib
from contextlib import contextmanager

# families whose methods verl replaces, on the classes, when it builds an engine
PATCHED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")


@contextmanager
def transformers_as_it_was():
    """Gives the classes of these families back the attributes that they had, and those alone."""
    modules = [
        importlib.import_module(f"transformers.models.{name}.modeling_{name}") for name in PATCHED
    ]
    classes = [
        value for module in modules for value in vars(module).values() if isinstance(value, type)
    ]
    before = [
        (cls, dict(vars(cls)))
        for cls in classes
        if cls.__module__.startswith("transformers.models.")
    ]
    try:
        yield
    finally:
        for cls, attributes in before:
            for name in [name for name in vars(cls) if name not in attributes]:
                delattr(cls, name)
            for name, value in attributes.items():
                if vars(cls).get(name) is not value:
                    setattr(cls, name, value)
