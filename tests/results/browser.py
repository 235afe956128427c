"""A real headless Chromium, driven over its own pipe: no driver and no further package.

The protocol: JSON messages ended by a zero byte, read from file descriptor 3 and written to 4
(``--remote-debugging-pipe``).
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
TIMEOUT_S = 60.0


def executable() -> str | None:
    """Chromium's path, or None where there is none."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


def _high(descriptor: int) -> int:
    """The same file under a number that 3 and 4 do not collide with."""
    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(descriptor)
    return moved


class Browser:
    """One page in a fresh profile; everything that it does is bounded in time."""

    def __init__(self, profile: Path) -> None:
        program = executable()
        assert program is not None
        from_us, self._out = map(_high, os.pipe())
        self._in, to_us = map(_high, os.pipe())
        self._buffer = b""
        self._count = 0
        self.events: list[dict[str, Any]] = []
        # The shell puts our pipes where Chromium looks for them (a plain sh knows one digit only).
        flags = (
            f"--headless=new --no-sandbox --disable-gpu --no-first-run --hide-scrollbars "
            f"--remote-debugging-pipe --user-data-dir={profile} about:blank"
        )
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$0" {flags} 3<&{from_us} 4>&{to_us}', program],
            pass_fds=(from_us, to_us),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(from_us)
        os.close(to_us)
        self._session: str | None = None

    def __enter__(self) -> Browser:
        pages = self.call("Target.getTargets")["targetInfos"]
        target = next(page["targetId"] for page in pages if page["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Page.setLifecycleEventsEnabled", enabled=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.process.terminate()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(timeout=20)
        os.close(self._in)
        os.close(self._out)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol and wait for its answer."""
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return answer["result"]

    def open(self, file: Path, width: int, height: int, dark: bool) -> None:
        """Load a file at a width in CSS pixels."""
        self.events.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        loader = self.call("Page.navigate", url=file.resolve().as_uri())["loaderId"]
        # Of this very page: the empty one that the browser begins with may still be loading.
        while not any(
            event["method"] == "Page.lifecycleEvent"
            and (event["params"]["name"], event["params"]["loaderId"]) == ("load", loader)
            for event in self.events
        ):
            self._next()

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    @property
    def complaints(self) -> list[Any]:
        """What the page logged as errors, and what it wanted from the network."""
        bad = ("Runtime.exceptionThrown", "Log.entryAdded")
        found = [e for e in self.events if e.get("method") in bad]
        for event in self.events:
            if event.get("method") == "Network.requestWillBeSent":
                url = event["params"]["request"]["url"]
                if not url.startswith(("file:", "data:")):
                    found.append(url)
        return found

    def _next(self) -> dict[str, Any]:
        end = time.monotonic() + TIMEOUT_S
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], max(end - time.monotonic(), 0))
            assert ready, "Chromium does not answer"
            more = os.read(self._in, 1 << 20)
            assert more, "Chromium has gone"
            self._buffer += more
        text, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(text)
        if "method" in message:
            self.events.append(message)
        return message
