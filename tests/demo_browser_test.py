"""The page in headless Chromium, where it is installed with its driver; demo_test.py uses HTTP alone.

    apt-get install chromium chromium-driver    # 120 MB

The pictures of docs/demo.md: `SCREENSHOTS=docs/demo python -m pytest -n0 tests/demo_browser_test.py`.
"""

import contextlib
import importlib.util
import io
import json
import os
import shutil
import time
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import PIL.Image
import pytest
from page_model import StandIn

from monoformer_jax import demo

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--hide-scrollbars", "--force-color-profile=srgb"]  # fmt: skip
PATIENCE = 60  # seconds, beside other tests
NAMED = {"button", "textbox", "searchbox", "slider", "spinbutton", "checkbox", "link", "combobox"}

if not (CHROMIUM and DRIVER and importlib.util.find_spec("selenium")):
    pytest.skip("no Chromium here; demo_test.py uses the page over HTTP", allow_module_level=True)

from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(config):
    return StandIn(config)


@pytest.fixture(scope="module")
def driver(model, tmp_path_factory):
    """A browser with an empty profile that logs every request, and a page."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    with demo.serve(model, "digits, step 1400") as (address, _):
        browser = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
        browser.address = address
        try:
            yield browser
        finally:
            browser.quit()


class Visitor:
    """A person at the page."""

    def __init__(self, driver, width=1200, height=800, phone=False, dark=False):
        self.driver = driver
        self._cdp("Emulation.setDeviceMetricsOverride", width=width, height=height, mobile=phone,
                  deviceScaleFactor=1)  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._cdp("Emulation.setEmulatedMedia", features=[scheme])
        self.load()
        driver.execute_script("localStorage.clear()")  # a new person
        self.load()

    def _cdp(self, command, **arguments):
        return self.driver.execute_cdp_cmd(command, arguments)

    def load(self):
        self.driver.get(self.driver.address)
        self.until(lambda: self.box.get_attribute("aria-label") == "Message")

    def until(self, true):
        end = time.monotonic() + PATIENCE
        while True:
            with contextlib.suppress(Exception):  # elements come and go
                if value := true():
                    return value
            if time.monotonic() > end:
                self.driver.save_screenshot("demo_browser_test_failed.png")
                raise AssertionError(f"it did not happen; the notice is {self.notice!r}")
            time.sleep(0.05)

    def find(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    @property
    def box(self):
        return self.find("#box textarea")[0]

    @property
    def notice(self):
        return self.find("#notice")[0].text

    @property
    def said(self):
        return self.find("#chat")[0].text

    def pictures(self):
        found = self.find("#chat .bot .thumbnail-item img")
        return [image for image in found if image.get_property("naturalWidth") > 0]

    def say(self, text):
        self.until(lambda: not self.notice or "**" not in self.notice)
        self.box.send_keys(text, Keys.ENTER)
        self.until(lambda: text in self.said and not self.notice)

    def set(self, label, value):
        """Types a value into the number field of this label."""
        (field,) = self.driver.find_elements(
            By.XPATH,
            f"//input[@type='number'][contains(@aria-label,'{label}')] | "
            f"//label[contains(.,'{label}')]//input",
        )[:1]
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(str(value), Keys.TAB)

    def accessible(self):
        """(role, name) of everything that a screen reader is told."""
        self._cdp("Accessibility.enable")
        nodes = self._cdp("Accessibility.getFullAXTree")["nodes"]
        return [
            (node["role"]["value"], node.get("name", {}).get("value", ""))
            for node in nodes
            if not node["ignored"]
        ]

    def look(self, name):
        """Takes a screenshot, and writes it to the folder $SCREENSHOTS, of few kilobytes."""
        with PIL.Image.open(io.BytesIO(self.driver.get_screenshot_as_png())) as picture:
            now = picture.convert("RGB")
        assert np.asarray(now).std() > 0
        if folder := os.environ.get("SCREENSHOTS"):
            now.quantize(64).save(Path(folder) / f"{name}.png", optimize=True)


def test_a_visitor_draws_stops_regenerates_edits_and_reloads(driver, model):
    visitor = Visitor(driver)
    visitor.set("Pictures", 4)
    visitor.set("Seed", 7)
    model.seconds = 0.3
    visitor.box.send_keys("draw a seven", Keys.ENTER)
    visitor.until(lambda: visitor.pictures() and "seed 7" in visitor.notice)
    visitor.load()  # while the answer goes on
    visitor.until(lambda: "picture 2 of 4" in visitor.notice)
    visitor.find("#stop")[0].click()
    visitor.until(lambda: not visitor.notice)
    assert "seed 7" in visitor.said and "seed 9" not in visitor.said
    model.seconds = 0
    visitor.find("#regenerate")[0].click()
    visitor.until(lambda: len(visitor.pictures()) == 4 and not visitor.notice)
    assert all(f"seed {seed}" in visitor.said for seed in (7, 8, 9, 10))

    visitor.pictures()[1].click()  # enlarged, with a download
    visitor.until(lambda: visitor.find("#enlarged[open] img")[0].size["width"] > 300)
    assert visitor.find("#enlarged a")[0].get_property("download") == "seed-8.png"
    driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not visitor.find("#enlarged[open]")

    visitor.find("#attach")[0].click()
    visitor.until(lambda: visitor.find("#box img"))
    visitor.say("read this: ")
    assert "picture of 128" in visitor.said
    visitor.say("<img src=x onerror=alert(1)><b>bold</b>")  # shown as it was written
    assert "<b>bold</b>" in visitor.said and not visitor.find("#chat .message b")

    visitor.load()  # the settings and the conversation are kept
    visitor.until(lambda: len(visitor.pictures()) == 4)
    (steps,) = visitor.find("input[aria-label='number input for Pictures']")
    visitor.until(lambda: steps.get_property("value") == "4")
    driver.execute_script("arguments[0].value = 'x'.repeat(20001);"
                          "arguments[0].dispatchEvent(new Event('input'))", visitor.box)  # fmt: skip
    visitor.box.send_keys(Keys.ENTER)
    visitor.until(lambda: "20001 characters" in visitor.notice)
    assert len(visitor.box.get_property("value")) == 20_001  # the refused text is kept
    visitor.find("#new")[0].click()
    visitor.until(lambda: not visitor.pictures() and not visitor.notice)

    log = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = [entry["params"]["request"]["url"] for entry in log
             if entry["method"] == "Network.requestWillBeSent"]  # fmt: skip
    places = {urlsplit(url).netloc for url in asked if urlsplit(url).scheme in ("http", "https")}
    assert places == {urlsplit(driver.address).netloc}  # nothing leaves the machine
    said = [entry["message"] for entry in driver.get_log("browser")]
    assert not [text for text in said if "Content Security Policy" in text], said


def test_everything_has_a_name_and_the_keyboard_is_enough(driver, model):
    visitor = Visitor(driver)
    driver.switch_to.active_element.send_keys("draw a two", Keys.ENTER)  # the box has the focus
    visitor.until(lambda: visitor.pictures() and not visitor.notice)
    told = visitor.accessible()
    assert not [role for role, name in told if role in NAMED and not name.strip()], told
    assert ("log", "chatbot conversation") in told  # announces the answer
    assert "status" in {role for role, _ in told}  # announces the place in the line, and errors
    assert any(role == "image" and name.startswith("seed ") for role, name in told)
    reached = set()
    for _ in range(40):
        driver.switch_to.active_element.send_keys(Keys.TAB)
        reached.add(driver.switch_to.active_element.get_attribute("id"))
    assert {"stop", "regenerate", "attach", "new"} <= reached


@pytest.mark.parametrize(
    "name, size", [("desktop", (1200, 800)), ("zoomed", (640, 400)), ("phone", (375, 720))]
)
def test_fits_the_screen_in_light_and_dark(name, size, driver, model):
    """At 200 % a window of 1280 × 800 has 640 × 400 pixels of CSS."""
    for dark in (False, True):
        visitor = Visitor(driver, *size, phone=name == "phone", dark=dark)
        visitor.set("Seed", 11)
        visitor.say("draw a four")
        visitor.set("Pictures", 2)
        visitor.say("draw a seven")
        driver.execute_script("scrollTo(0, 0)")
        wide = driver.execute_script("return document.documentElement.scrollWidth")
        assert wide <= size[0]
        background = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
        (red,) = map(int, background.removeprefix("rgb(").split(",")[:1])
        assert (red < 60) == dark, background
        top = "return arguments[0].getBoundingClientRect().bottom"
        if name != "zoomed":
            assert driver.execute_script(top, visitor.box) <= size[1]
        if name == "desktop":  # the settings stand above the fold
            (last,) = visitor.find("input[aria-label='number input for Pictures']")
            assert driver.execute_script(top, last) <= size[1]
        if dark == (name == "phone") and name != "zoomed":
            visitor.look(name)
