"""A page of the explorer in a browser, watched for everything that it must not do."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class Watched:
    """The page of a file. `close` asserts that it logged nothing, raised nothing, opened no dialog
    and asked for nothing but the file itself."""

    def __init__(self, browser: Any, file: Path, scheme: str = "light") -> None:
        context = browser.new_context(
            viewport={"width": 1400, "height": 900}, color_scheme=scheme, offline=True
        )
        self.page = context.new_page()
        self.logged: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.logged.append(message.text))
        self.page.on("pageerror", lambda error: self.logged.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.logged.append("dialog"), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.url = file.resolve().as_uri()
        self.page.goto(self.url)
        self.page.wait_for_selector("#passes .pass")

    def close(self) -> None:
        assert not self.logged, self.logged
        assert self.requests == [self.url]
        self.page.context.close()
