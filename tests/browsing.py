"""Chromium without a window, driven through its DevTools protocol over two pipes: no package is needed for that.

The protocol: https://chromedevtools.github.io/devtools-protocol/, messages of JSON that end with a zero byte.
"""

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium to run the page's script")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --remote-debugging-pipe"
)
KEYS = {"Enter": 13, "Escape": 27, "Tab": 9, "ArrowRight": 39, "ArrowLeft": 37, " ": 32, "Home": 36, "End": 35}


class Page:
    """One tab."""

    def __init__(self, profile: Path) -> None:
        ours, theirs = os.pipe(), os.pipe()  # we read from the first and write into the second
        high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 16) for end in (theirs[0], ours[1])]
        for end in (theirs[0], ours[1]):
            os.close(end)
        actions = [(os.POSIX_SPAWN_DUP2, high[0], 3), (os.POSIX_SPAWN_DUP2, high[1], 4)]
        actions += [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_RDWR, 0) for number in (0, 1, 2)]
        command = [CHROMIUM, *FLAGS.split(), f"--user-data-dir={profile}", "about:blank"]
        self._process = os.posix_spawn(CHROMIUM, command, dict(os.environ), file_actions=actions, setpgroup=0)
        for end in high:
            os.close(end)
        self._read, self._write = ours[0], theirs[1]
        self._buffer, self._last, self._session = b"", 0, None
        self.events: list[dict] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        with contextlib.suppress(OSError, TimeoutError, EOFError):
            self._session = None
            self.call("Browser.close", limit=5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process, signal.SIGKILL)
        os.waitpid(self._process, 0)
        for end in (self._read, self._write):
            os.close(end)

    def _message(self, deadline: float) -> dict:
        while b"\0" not in self._buffer:
            if not select.select([self._read], [], [], max(deadline - time.monotonic(), 0))[0]:
                raise TimeoutError("the browser does not answer")
            if not (read := os.read(self._read, 1 << 20)):
                raise EOFError("the browser has ended")
            self._buffer += read
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def call(self, method: str, *, limit: float = 30, **params) -> dict:
        """Do one thing of the protocol; events that come meanwhile are kept."""
        self._last += 1
        session = {"sessionId": self._session} if self._session else {}
        os.write(
            self._write, json.dumps({"id": self._last, "method": method, "params": params, **session}).encode() + b"\0"
        )
        deadline = time.monotonic() + limit
        while True:
            message = self._message(deadline)
            if message.get("id") == self._last:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]
            if "method" in message:
                self.events.append(message)

    def do(self, script: str):
        """Run an expression in the page and return its value; promises are waited for."""
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, script: str, limit: float = 20) -> None:
        """Wait until an expression in the page is true."""
        deadline = time.monotonic() + limit
        while not self.do(f"Boolean({script})"):
            assert time.monotonic() < deadline, f"never: {script}\n{self.do('document.body.innerText')}"
            time.sleep(0.02)

    def open(self, url: str) -> None:
        """Load a page anew, also one that differs from the last by its fragment alone."""
        self.call("Page.navigate", url="about:blank")
        self.until("location.href === 'about:blank'")
        self.events.clear()
        self.call("Page.navigate", url=url)
        self.until("location.href !== 'about:blank' && document.readyState === 'complete'")

    def key(self, name: str, *, control: bool = False, shift: bool = False) -> None:
        """Press a key, as by hand."""
        code = KEYS.get(name) or ord(name.upper())
        text = {"Enter": "\r"}.get(name, name if len(name) == 1 else "")
        common = {"key": name, "code": name, "windowsVirtualKeyCode": code, "modifiers": 2 * control + 8 * shift}
        down = {"text": text} if text and not control else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **common, **down)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def write(self, text: str) -> None:
        """Write text where the focus is, as by hand."""
        self.call("Input.insertText", text=text)

    def bodies(self, path: str) -> list[dict]:
        """Return what was sent to a path since the page was opened."""
        sent = [e["params"]["request"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return [json.loads(r["postData"]) for r in sent if r["url"].endswith(path) and "postData" in r]

    def complaints(self) -> list[str]:
        """Return errors of scripts, and what the browser refused, since the page was opened."""
        self.do("1")
        thrown = [e["params"] for e in self.events if e["method"] == "Runtime.exceptionThrown"]
        entries = [e["params"]["entry"] for e in self.events if e["method"] == "Log.entryAdded"]
        refused = [e["text"] for e in entries if e["level"] == "error" and e["source"] != "network"]
        return [json.dumps(each) for each in thrown] + refused

    def picture(self, path: Path, width: int, height: int, *, dark: bool = False, whole: bool = False) -> None:
        """Write a picture of the page at a size of the window."""
        self.resize(width, height, dark=dark)
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))

    def resize(self, width: int, height: int, *, dark: bool = False) -> None:
        """Give the window another size and the system another preference of colours."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.do("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


@contextlib.contextmanager
def browsing(profile: Path) -> Iterator[Page]:
    """Yield a tab of a browser of its own."""
    page = Page(profile)
    try:
        yield page
    finally:
        page.close()
