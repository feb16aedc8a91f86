"""End-to-end check of `monoformer_jax.demo` in headless Chromium; not part of pytest.

    apt-get install chromium chromium-driver    # 120 MB
    pip install -e '.[demo]' selenium
    python tests/browser_check.py --workdir=runs/digits --screenshot=demo.png

It sends messages, reloads while an image is generated, uploads the image, sends a message that is too
long, and checks every request of the browser. Exits with 1 if one went to another host or was blocked.
"""

import argparse
import contextlib
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

import PIL.Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--window-size=900,1250"]  # fmt: skip
WEB = ("http", "https", "ws", "wss")
PATIENCE = 180  # seconds; the first answer includes compilation


@contextlib.contextmanager
def page(workdir):
    """Starts the demo command and yields its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "monoformer_jax.demo",
        f"--workdir={workdir}",
        f"--port={port}",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as served:
        try:
            lines = iter(served.stdout.readline, "")
            yield next(line.split()[1] for line in lines if line.startswith("serving "))
        finally:
            served.terminate()


@contextlib.contextmanager
def browser():
    """Chromium with an empty profile that logs every request."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or sys.exit("there is no chromium")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    with tempfile.TemporaryDirectory() as profile:
        for flag in [*FLAGS, f"--user-data-dir={profile}"]:
            options.add_argument(flag)
        driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
        try:
            yield driver
        finally:
            driver.quit()


def wait(driver, what, name):
    print(f"{name} …", flush=True)
    begin = time.time()
    found = WebDriverWait(driver, PATIENCE, poll_frequency=0.2).until(lambda _: what())
    print(f"  after {time.time() - begin:.1f} s", flush=True)
    return found


def requests(driver):
    """URLs requested by the browser since the last call."""
    for entry in driver.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            yield message["params"]["request"]["url"]


def use(driver, address, screenshot):
    """Runs the user interaction."""

    def pictures():
        found = driver.find_elements(By.CSS_SELECTOR, "#chat .bot img")
        return [x for x in found if x.get_property("naturalWidth") > 0]

    def box():
        return driver.find_element(By.CSS_SELECTOR, "#box textarea")

    def notice():
        return driver.find_element(By.ID, "notice").text

    def texts():
        return driver.find_element(By.ID, "chat").text

    driver.get(address)
    wait(driver, lambda: driver.find_elements(By.CSS_SELECTOR, "#box textarea"), "page loaded")
    box().send_keys("draw a seven", Keys.ENTER)
    wait(driver, pictures, "preview of an image")
    driver.refresh()
    wait(driver, lambda: pictures() and not notice(), "complete image, after a reload meanwhile")
    with tempfile.NamedTemporaryFile(suffix=".png") as seven:
        seven.write(pictures()[-1].screenshot_as_png)
        seven.flush()
        driver.refresh()
        wait(driver, pictures, "image, after another reload")
        assert "draw a seven" in texts()
        driver.find_element(By.CSS_SELECTOR, "#box input[type=file]").send_keys(seven.name)
        wait(driver, lambda: driver.find_elements(By.CSS_SELECTOR, "#box img"), "upload")
        box().send_keys("read this: ", Keys.ENTER)
        wait(driver, lambda: "seven" in texts().partition("read this:")[2], "reading the image")
    box().send_keys("two plus three is", Keys.ENTER)
    wait(driver, lambda: "five" in texts(), "text answer")
    wait(driver, lambda: not notice(), "end of the text answer")
    if screenshot:
        driver.save_screenshot(str(screenshot))
    box().send_keys("x" * 500, Keys.ENTER)
    sentence = wait(driver, lambda: "context" in notice() and notice(), "error message")
    print(f"  {sentence}")
    assert "Traceback" not in driver.page_source
    assert "x" * 500 in box().get_property("value")  # the rejected text is kept


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, required=True, help="folder of a digits run")
    parser.add_argument("--screenshot", type=Path, help="write a screenshot to this file")
    args = parser.parse_args()
    with page(args.workdir) as address, browser() as driver:
        try:
            use(driver, address, args.screenshot)
        except BaseException:
            driver.save_screenshot("browser_check_failed.png")
            raise
        asked = [url for url in map(urlsplit, requests(driver)) if url.scheme in WEB]
        outside = sorted({url.netloc for url in asked if url.hostname != "127.0.0.1"})
        print(f"{len(asked)} requests, {len(outside)} to other hosts {outside}")
        log = [x["message"] for x in driver.get_log("browser")]
        refused = [text for text in log if "Content Security Policy" in text]
        print(f"{len(refused)} blocked by the content security policy {refused}")
    if args.screenshot:
        with PIL.Image.open(args.screenshot) as picture:
            picture.convert("P", palette=PIL.Image.Palette.ADAPTIVE).save(
                args.screenshot, optimize=True
            )
    sys.exit(1 if outside or refused else 0)


if __name__ == "__main__":
    main()
