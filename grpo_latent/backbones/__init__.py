"""Families of models, one file each; `protocol.Backbone` says what a family is.

A file in this folder registers itself.
"""

from grpo_latent.common.registry import import_folder

import_folder(__name__, __path__)
