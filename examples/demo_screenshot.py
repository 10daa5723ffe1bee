"""Takes the picture of the demo in the documentation: the command on the quickstart's output, in a headless Chromium.

    make quickstart
    python examples/demo_screenshot.py quickstart-output docs/images/demo.png

Needs chromium and chromedriver of the system, and the packages selenium and pillow.
"""

from __future__ import annotations

import argparse
import io
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait

from tangent_peft.cli.demo_pictures import describe


WIDTH, HEIGHT = 1280, 1000
COLORS = 200  # a palette keeps the file small
PATIENCE = 300.0
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync")


def main() -> None:
    """Serves, looks, saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("quickstart", type=Path, help="what `make quickstart` wrote")
    parser.add_argument("picture", type=Path, help="PNG file to write")
    parser.add_argument("--weight", default=-1.0, type=float, help="λ_verb of the point to choose in the sweep")
    parser.add_argument("--question", default=1, type=int, help="which of the questions offered")
    parser.add_argument("--port", default=7865, type=int)
    options = parser.parse_args()
    command = [sys.executable, "-m", "tangent_peft.cli.main", "demo", str(options.quickstart / "axes"), "--no-browser"]
    command += ["--sweep", str(options.quickstart / "sweep.json"), "--port", str(options.port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None and "runs at" in server.stdout.readline(), "the demo did not start"
            photograph(f"http://127.0.0.1:{options.port}", options)
        finally:
            server.terminate()
    print(f"{options.picture}: {options.picture.stat().st_size / 1000:.0f} kB")


def photograph(address: str, chosen: argparse.Namespace) -> None:
    """Chooses a point of the sweep for mix B, asks a question, waits, and saves the whole page."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    with tempfile.TemporaryDirectory() as profile:
        for flag in (*FLAGS, f"--window-size={WIDTH},{HEIGHT}", f"--user-data-dir={profile}"):
            options.add_argument(flag)
        driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
        try:
            driver.get(address)

            def until(condition: Callable[[], object]) -> None:
                WebDriverWait(driver, PATIENCE).until(lambda _: condition())

            def find(selector: str) -> list[webdriver.remote.webelement.WebElement]:
                return driver.find_elements("css selector", selector)

            point = f'#sweep .near[aria-label^="{describe({"verb": chosen.weight})} "]'
            until(lambda: find(point))
            find(point)[0].send_keys("\n")
            until(lambda: find("#sweep .ring.mix-b"))
            question = find("#examples button")[chosen.question]
            question.click()
            until(lambda: find("#question textarea")[0].get_attribute("value") == question.text)
            find("#ask")[0].click()
            until(lambda: find(".status.busy"))
            until(lambda: not find(".status.busy") and not find(".gauge.unknown"))
            height = driver.execute_script("return document.documentElement.scrollHeight")
            driver.execute_cdp_cmd(
                "Emulation.setDeviceMetricsOverride",
                {"width": WIDTH, "height": height, "deviceScaleFactor": 1, "mobile": False},
            )
            driver.execute_script("document.activeElement.blur()")
            time.sleep(1)  # the page fades a little
            image = Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")
        finally:
            driver.quit()
    chosen.picture.parent.mkdir(parents=True, exist_ok=True)
    image.quantize(COLORS, dither=Image.Dither.NONE).save(chosen.picture, optimize=True)


if __name__ == "__main__":
    main()
