"""Families of models, one file each; `protocol.Backbone` says what a family is.

A file in this folder registers itself.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
