"""Small ILVR records with random helper images."""

import numpy as np
from PIL import Image


def write_images(folder):
    rng = np.random.default_rng(0)
    for name, size in (("q", (28, 42)), ("h1", (28, 28)), ("h2", (42, 42)), ("h3", (14, 14))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(
            folder / f"{name}.png"
        )


def record(*plan, question="read red ?"):
    items = [
        {"type": "latent", "helper_image": f"{item[1:]}.png"}
        if item[0] == "@"
        else {"type": "text", "content": item}
        for item in plan
    ]
    return {
        "text_input": question,
        "image_input": ["q.png"],
        "sequence_plan": items,
        "original_final_answer": "7",
    }


PLANS = (
    ("read red", "@h1", "3 ?", "@h2", "<answer> 7 </answer>"),
    ("@h3", "@h2", "blue <answer> 3 </answer>"),
    ("<answer> 7 </answer>",),
)
