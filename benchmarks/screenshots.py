"""Takes the pictures of the inspector's page that the documentation shows, of a finished run.

    python benchmarks/screenshots.py outputs/quickstart [--out docs/pictures]

inspector.png: the top of the page, one trajectory opened by its link, ablations and their verdict,
one below the other.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from headless import headless, open_page
from PIL import Image

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

# of the newest group that has a signal and whose latents were probed, the best trajectory
BEST = """
const fits = (group) => group.open && group.probed && group.reward_std > 0;
const index = OVERVIEW.groups.reduce(
  (best, g, i, all) => (fits(g) && (best < 0 || g.step > all[best].step) ? i : best), -1);
return linkTo(OVERVIEW.groups[index], groupBlock(index).trajectories.reduce((a, b) => (b.reward > a.reward ? b : a)));
"""
HEADER, SCROLLBAR = 46, 15  # pixels of what stays at the window's edges
DRAWN = "return document.querySelectorAll('{} .main-svg').length > 0"


def main() -> None:
    """Makes the page of a run and takes its pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, headless(1400, 1000) as driver:
        page = Path(folder) / "report.html"
        command = [sys.executable, "-m", "grpo_latent.inspect", str(options.run)]
        subprocess.run([*command, "--out", str(page)], check=True, stdout=subprocess.DEVNULL)
        open_page(driver, page)
        shots = [take(driver, "cards", 590)]
        link = driver.execute_script(BEST)
        driver.get("about:blank")
        open_page(driver, page, link)
        shots.append(take(driver, "trajectory", 855))
        driver.execute_script("document.getElementById('ablations').scrollIntoView()")
        wait(driver, DRAWN.format("#ablation-charts"))
        shots.append(take(driver, "ablations", 600))
    path = options.out / "inspector.png"
    below(shots).quantize(256).save(path, optimize=True)
    print(path)


def take(driver: Chrome, section: str, height: int) -> Image.Image:
    """Takes what is in the window from a section's top on."""
    driver.execute_script(f"document.getElementById('{section}').scrollIntoView()")
    time.sleep(1.0)  # pictures and charts are drawn when they come into view
    shot = Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")
    top = 0 if section == "cards" else HEADER
    return shot.crop((0, top, shot.width - SCROLLBAR, height))


def below(shots: list[Image.Image]) -> Image.Image:
    """Puts pictures of one width below each other."""
    whole = Image.new("RGB", (shots[0].width, sum(shot.height for shot in shots)))
    top = 0
    for shot in shots:
        whole.paste(shot, (0, top))
        top += shot.height
    return whole


def wait(driver: Chrome, script: str, seconds: float = 20.0) -> None:
    """Waits until a script gives true; raises `TimeoutError`."""
    end = time.monotonic() + seconds
    while not driver.execute_script(script):
        if time.monotonic() > end:
            raise TimeoutError(script)
        time.sleep(0.05)


if __name__ == "__main__":
    main()
