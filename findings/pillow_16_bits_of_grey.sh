#!/usr/bin/env bash
# pillow 13.0.0, numpy 2.3.5, seen on 2026-11-28.
#
# Guess: one picture, saved as a PNG of 16 bits in grey and of 16 bits in colour, is one picture after convert("RGB").
# Seen:  of colour the upper eight bits are kept (0x8000 is 128), and nothing says that sixteen were there: the mode is RGB.
#        Grey opens as I;16, and convert("RGB") clips it: 0x00ff and all above, 99.6 % of the range, are white; no warning.
#
# Means: X-rays, depth maps and microscopy, which are grey PNGs of 16 bits, reach a model as white squares through the
#        convert("RGB") that nearly every data set class has. grpo_latent/backbones/images.py: to_rgb keeps the upper eight
#        bits of both, and refuses modes without a known range (tests/backbones/test_images.py).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check pillow==13.0.0 numpy==2.3.5
"$folder/venv/bin/python" - <<'PYTHON'
import io
import struct
import sys
import zlib

import numpy as np
from PIL import Image

VALUES = [0x0000, 0x0012, 0x00FF, 0x0100, 0x8000, 0xFFFF]


def png(samples_of_pixel: int) -> bytes:
    """One line of the values, 16 bits a sample: 1 sample a pixel is grey, 3 are colour."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    line = b"\0" + b"".join(struct.pack(">H", value) * samples_of_pixel for value in VALUES)
    header = struct.pack(">IIBBBBB", len(VALUES), 1, 16, 2 if samples_of_pixel == 3 else 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(line)) + chunk(b"IEND", b"")


seen = {}
for name, samples in (("grey", 1), ("colour", 3)):
    image = Image.open(io.BytesIO(png(samples)))
    seen[name] = (image.mode, np.asarray(image.convert("RGB"))[0, :, 0].tolist())
    print(name, *seen[name])
expected = {"grey": ("I;16", [0, 18, 255, 255, 255, 255]), "colour": ("RGB", [0, 0, 0, 1, 128, 255])}
sys.exit("changed: see above" if seen != expected else 0)
PYTHON
