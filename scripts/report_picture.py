"""Take the picture of a run's page for the README, in headless Chromium: `pip install playwright`.

ciphertune run name=sealed && CHROMIUM=/path/to/chromium python scripts/report_picture.py runs/sealed docs/report.png
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from ciphertune.report.page import write_page


def main() -> None:
    """The first screen of a window of 1280 x 720."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as playwright:
        page = write_page(options.run, Path(scratch) / "report.html")
        path = os.environ.get("CHROMIUM") or shutil.which("chromium") or playwright.chromium.executable_path
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        window = browser.new_page(viewport={"width": 1280, "height": 720})
        window.goto(page.as_uri())
        window.screenshot(path=str(options.out))
        browser.close()


if __name__ == "__main__":
    main()
