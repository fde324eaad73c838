"""A page in headless Chromium, by the DevTools protocol through ChromeDriver's plain HTTP."""

import base64
import contextlib
import json
import shutil
import socket
import subprocess
import time
import urllib.request

PRESENT = all(map(shutil.which, ("chromium", "chromedriver")))
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--hide-scrollbars",
)


class Browser:
    """A session of ChromeDriver."""

    def __init__(self, address):
        self._address = address

    def call(self, command, **values):
        """One command of the WebDriver protocol."""
        data = json.dumps(values).encode()
        request = urllib.request.Request(
            self._address + command, data, {"Content-Type": "text/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def run(self, script):
        """What a script returns."""
        return self.call("/execute/sync", script=script, args=[])

    def open(self, file, *, width, height=900, dark=False):
        """Opens a file at a width of the window, light or dark."""
        self.cdp("Emulation.setDeviceMetricsOverride", width=width, height=height,
                 deviceScaleFactor=1, mobile=width < 600)  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.cdp("Emulation.setEmulatedMedia", features=[scheme])
        self.call("/url", url=file.resolve().as_uri())

    def cdp(self, command, **values):
        """One command of the DevTools protocol."""
        return self.call("/goog/cdp/execute", cmd=command, params=values)

    def screenshot(self, height=None):
        """A PNG of the window, or of the page down to a height."""
        options = {}
        if height is not None:
            width = self.run("return document.documentElement.clientWidth")
            clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
            options = {"clip": clip, "captureBeyondViewport": True}
        return base64.b64decode(self.cdp("Page.captureScreenshot", format="png", **options)["data"])


@contextlib.contextmanager
def browser(profile):
    """A browser with a new profile in the folder `profile`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    driver = subprocess.Popen(
        ["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        plain = Browser(f"http://127.0.0.1:{port}")
        options = {"args": [*FLAGS, f"--user-data-dir={profile}"]}
        for _ in range(100):
            try:
                session = plain.call("/session", capabilities={
                    "alwaysMatch": {"goog:chromeOptions": options}})  # fmt: skip
                break
            except OSError:
                time.sleep(0.2)
        opened = Browser(f"http://127.0.0.1:{port}/session/{session['sessionId']}")
        yield opened
        with contextlib.suppress(OSError):
            urllib.request.urlopen(
                urllib.request.Request(opened._address, method="DELETE"), timeout=20
            )
    finally:
        driver.terminate()
        driver.wait(20)
