#!/usr/bin/env bash
# transformers 5.12.0 and 5.13.0: a minor release renames an abstract method of the class from which layers of a cache derive,
# CacheLayerMixin.get_max_cache_shape, now get_max_length, without a second name for a while: a subclass that fits one release
# cannot be instantiated under the other.
#
# Guess, written down before: the change came with 5.11, where verl 0.9.1's range ends (so this project's setup.py said).
# Seen, 2026-11-28:
#   5.12.0 get_mask_sizes get_max_cache_shape get_seq_length lazy_initialization update
#   5.13.0 get_mask_sizes get_max_length get_seq_length lazy_initialization update
#
# Here: grpo_latent/models/kv_cache.py is such a subclass; grpo_latent/models/seams.py holds its methods, and
# tests/models/test_seams.py names the change (requirements/versions/transformers-5.13.txt).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for version in 5.12.0 5.13.0; do
  pip install --quiet --disable-pip-version-check --no-deps --target "$folder/$version" "transformers==$version"
  # read, not imported: that would need torch
  python3 - "$folder/$version/transformers/cache_utils.py" "$version" << 'PYTHON' | tee -a "$folder/seen"
import ast, sys
from pathlib import Path

classes = {n.name: n for n in ast.parse(Path(sys.argv[1]).read_text()).body if isinstance(n, ast.ClassDef)}
methods = [n for n in classes["CacheLayerMixin"].body if isinstance(n, ast.FunctionDef)]
abstract = sorted(n.name for n in methods if any(ast.unparse(d) == "abstractmethod" for d in n.decorator_list))
print(sys.argv[2], *abstract)
PYTHON
done
diff "$folder/seen" - << 'SEEN'
5.12.0 get_mask_sizes get_max_cache_shape get_seq_length lazy_initialization update
5.13.0 get_mask_sizes get_max_length get_seq_length lazy_initialization update
SEEN
