"""Headless Chromium, for the page's tests, its timing and its pictures in the documentation."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
DRIVER = shutil.which("chromedriver")
READY = "return document.body.dataset.ready === 'true'"


@contextmanager
def headless(width: int = 1500, height: int = 1000) -> Iterator[Chrome]:
    """Opens a browser whose console and requests are logged, and closes it."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    # --no-sandbox: Chromium refuses to run as root otherwise, as in a container
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        f"--window-size={width},{height}",
    ):
        options.add_argument(argument)
    options.binary_location = CHROMIUM or ""
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    # the browser's profile has a socket, whose path has 107 bytes at most: not below a folder that
    # may have a long name
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        service = webdriver.ChromeService(DRIVER, env=os.environ | {"TMPDIR": folder})
        driver = webdriver.Chrome(options=options, service=service)
        try:
            yield driver
        finally:
            driver.quit()


def open_page(driver: Chrome, page: Path, fragment: str = "") -> None:
    """Opens an inspector's page and waits until it can be used."""
    driver.get(page.as_uri() + fragment)
    while not driver.execute_script(READY):
        time.sleep(0.01)
