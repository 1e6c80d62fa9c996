"""A headless Chromium, driven through chromedriver's own protocol (W3C WebDriver): HTTP and JSON, no package."""

import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from base64 import b64decode
from collections.abc import Callable
from pathlib import Path
from typing import Any

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
MISSING = "no chromium or chrome with its chromedriver is installed" if BROWSER is None or DRIVER is None else None
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key under which the protocol names an element
QUIET = [  # a browser that asks for nothing of its own
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
]
OPTIONS = [
    *QUIET,
    "--headless=new",
    "--disable-dev-shm-usage",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
]
WAIT = 20.0  # seconds for what a page is expected to do
KEYS = {"enter": "\ue007", "backspace": "\ue003", "control": "\ue009"}


class Browser:
    """One window. Waiting is by condition, never by time."""

    def __init__(self, profile: Path, width: int = 1200, height: int = 900, language: str = "en-US") -> None:
        self.process = subprocess.Popen([str(DRIVER), "--port=0"], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        lines = iter(self.process.stdout.readline, "")
        found = next(filter(None, (re.search(r"started successfully on port (\d+)", line) for line in lines)), None)
        assert found is not None, "chromedriver ended before it said its port"
        self.base = f"http://127.0.0.1:{found[1]}"
        arguments = [*OPTIONS, f"--user-data-dir={profile}", f"--window-size={width},{height}", f"--lang={language}"]
        wanted = {
            "goog:chromeOptions": {"binary": BROWSER, "args": arguments},
            "goog:loggingPrefs": {"performance": "ALL", "browser": "ALL"},
        }
        try:
            session = self.call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        except OSError:
            self.process.kill()
            raise
        self.base += f"/session/{session['sessionId']}"

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if method == "GET" else json.dumps(body or {}).encode()
        request = urllib.request.Request(self.base + path, data, {"Content-Type": "application/json"}, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def close(self) -> None:
        try:
            self.call("DELETE", "")
        finally:
            self.process.terminate()
            self.process.wait()

    def open(self, url: str) -> None:
        self.call("POST", "/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        return self.call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def find(self, selector: str) -> str:
        """The path of an element, which may yet have to come."""

        def look() -> str | None:
            try:
                found = self.call("POST", "/element", {"using": "css selector", "value": selector})
            except urllib.error.HTTPError:
                return None
            return f"/element/{found[ELEMENT]}"

        return self.wait(look, f"{selector} to appear")

    def click(self, selector: str) -> None:
        """Click when the element is there, in sight, and not disabled."""
        element = self.find(selector)
        self.wait(lambda: self.call("GET", f"{element}/enabled"), f"{selector} to be enabled")

        def attempt() -> bool:
            try:
                self.call("POST", f"{self.find(selector)}/click")
            except urllib.error.HTTPError:  # something moved in between
                return False
            return True

        self.wait(attempt, f"{selector} to be clicked")

    def write(self, selector: str, text: str) -> None:
        """Type into a box in place of what stands in it."""
        element = self.find(selector)
        self.call("POST", f"{element}/click")
        self.call("POST", f"{element}/value", {"text": KEYS["control"] + "a"})
        self.call("POST", f"{element}/value", {"text": KEYS["backspace"] + text})

    def text(self, selector: str) -> str:
        """The text as it is in the document, line breaks included; nothing when the element is not there."""
        return self.run("return document.querySelector(arguments[0])?.textContent ?? ''", selector)

    def value(self, selector: str) -> str:
        """What stands in a box."""
        return self.run("return document.querySelector(arguments[0])?.value ?? ''", selector)

    def count(self, selector: str) -> int:
        return self.run("return document.querySelectorAll(arguments[0]).length", selector)

    def enabled(self, selector: str) -> bool:
        return self.run(
            "const found = document.querySelector(arguments[0]); return !!found && !found.disabled", selector
        )

    def wait(self, condition: Callable[[], Any], what: str, seconds: float = WAIT) -> Any:
        """What the condition returns as soon as it is true."""
        ends_at = time.monotonic() + seconds
        while not (result := condition()):
            assert time.monotonic() < ends_at, f"waited {seconds:g} seconds in vain for {what}"
            time.sleep(0.02)
        return result

    def wait_text(self, selector: str, part: str) -> str:
        return self.wait(lambda: self.text(selector) if part in self.text(selector) else "", f"{part!r} in {selector}")

    def requested(self) -> set[str]:
        """All addresses that were asked for since the last call."""
        entries = self.call("POST", "/se/log", {"type": "performance"})
        messages = [json.loads(entry["message"])["message"] for entry in entries]
        urls = [
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        ]
        return {url for url in urls if not url.startswith(("data:", "blob:", "chrome"))}

    def screenshot(self, file: Path) -> None:
        file.write_bytes(b64decode(self.call("GET", "/screenshot")))
