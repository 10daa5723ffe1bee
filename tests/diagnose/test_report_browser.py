"""The page of a report in a real Chromium: nothing is fetched, nothing is complained about, it fits, dark and light."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from stub_reports import report

from tangent_peft.diagnose.report import write_report


CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.xdist_group("browser"),
    pytest.mark.skipif(
        CHROMIUM is None or DRIVER is None,
        reason="chromium or chromedriver is not installed: apt-get install chromium chromium-driver",
    ),
]

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=900,1200",
)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A browser that nobody has used before."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options, Service(DRIVER))
    yield started
    started.quit()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_opens_and_asks_for_nothing(driver: Any, tmp_path: Path, scheme: str) -> None:
    write_report(report(), tmp_path / "out")
    driver.get("about:blank")
    driver.get_log("performance")  # of the page that a browser opens by itself
    driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    address = (tmp_path / "out" / "report.html").as_uri()
    driver.get(address)
    assert driver.title == "A report"
    assert not driver.get_log("browser"), "the console is empty"
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
    assert [url for url in asked if not url.startswith("data:")] == [address]
    assert driver.execute_script("return [...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert driver.execute_script("return document.images.length") == 1
    wide = "return document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    assert driver.execute_script(wide), "the page itself does not scroll sideways"
    lightness = driver.execute_script(
        "return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number).reduce((a, b) => a + b)"
    )
    assert (lightness > 600) if scheme == "light" else (lightness < 150)
    driver.find_element("css selector", "nav a[href='#two']").click()
    assert driver.current_url == f"{address}#two"
