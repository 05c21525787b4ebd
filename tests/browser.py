"""A headless Chromium for tests that look at a page the way a user does."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
CHROMEDRIVER = shutil.which("chromedriver")
MISSING = "" if CHROMIUM and CHROMEDRIVER else "needs chromium and chromedriver"

_FLAGS = (
    "--headless=new",
    "--no-sandbox",  # Chromium refuses its sandbox to root, whom tests in a container run as
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


@contextmanager
def open_browser(*, width_px: int = 1280, height_px: int = 900) -> Iterator[Chrome]:
    """Start a Chromium of its own, with an empty profile, and end it.

    Parameters
    ----------
    width_px, height_px : int
        Size of the page's view; changed later by `resize`.

    Yields
    ------
    selenium.webdriver.Chrome
        The browser; its console and its requests are recorded.
    """
    with tempfile.TemporaryDirectory(prefix="fruits-chromium-") as profile:
        options = ChromeOptions()
        options.binary_location = str(CHROMIUM)
        for flag in (*_FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        driver = Chrome(options=options, service=Service(executable_path=CHROMEDRIVER))
        try:
            resize(driver, width_px, height_px)
            driver.get("about:blank")  # instead of the start page, which loads much of its own
            yield driver
        finally:
            driver.quit()


def resize(driver: Chrome, width_px: int, height_px: int = 900) -> None:
    """Give the page exactly this view; windows cannot be as narrow as a phone."""
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width_px, "height": height_px, "deviceScaleFactor": 1, "mobile": False},
    )


def prefer(driver: Chrome, scheme: str) -> None:
    """Make the user prefer the ``light`` or the ``dark`` colour scheme."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def wait_for(driver: Chrome, script: str, *, timeout_seconds: float = 20) -> Any:
    """Wait until a JavaScript expression is true, and return its value."""
    return WebDriverWait(driver, timeout_seconds, poll_frequency=0.05).until(
        lambda _: driver.execute_script(f"return {script}"),
        message=f"never true: {script}",
    )


def console_problems(driver: Chrome) -> list[str]:
    """Return the warnings and errors of the console since the last call."""
    entries = driver.get_log("browser")  # type: ignore[no-untyped-call]
    return [entry["message"] for entry in entries if entry["level"] in ("WARNING", "SEVERE")]


def requested_urls(driver: Chrome) -> list[str]:
    """Return what pages asked for since the last call: files and anything on a network."""
    entries = driver.get_log("performance")  # type: ignore[no-untyped-call]
    messages = [json.loads(entry["message"])["message"] for entry in entries]
    urls = [
        str(message["params"]["request"]["url"])
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]
    return [url for url in urls if not url.startswith(("about:", "chrome:", "data:"))]
