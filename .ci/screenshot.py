#!/usr/bin/env python3
"""Draws .github/dashboard.png for the README: a real hub, five agents, a real Chromium.

    python3 .ci/screenshot.py [OUTPUT.png] [--dark]

Needs playwright, websockets and a Chromium. Installed fonts count: with Inter and JetBrains Mono
(Debian: fonts-inter, fonts-jetbrains-mono) it looks as in the README.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from playwright.sync_api import sync_playwright
from websockets.sync.client import ClientConnection, connect

ROOT = Path(__file__).resolve().parent.parent
AGENTS = [  # name, groups, type, host, project
    ("backend-dev", ["dev-team", "release"], "claude", "studio", "/home/kim/src/shop-api"),
    ("frontend-dev", ["dev-team"], "codex", "studio", "/home/kim/src/shop-web"),
    ("db-migrations", ["dev-team", "release"], "gemini", "build-01", "/srv/migrations"),
    ("reviewer", ["dev-team"], "opencode", "studio", "/home/kim/src/shop-api"),
    ("handbook", ["release"], "claude", "attic", "/home/ines/handbook"),
]
ABSENT, STUCK = "handbook", "frontend-dev"  # offline; a draft stands in its prompt since an hour
TALK = [  # minutes ago, from, to or #group, text, index of the message it answers
    (1500, "backend-dev", "frontend-dev",
     "`GET /orders` is paginated now; the spec is in `docs/orders.md`.", None),
    (1494, "frontend-dev", "backend-dev", "Looks good. Can the envelope carry `total_count`?", 0),
    (1490, "backend-dev", "frontend-dev", "Added, with a test: 3f9c2ab.", 1),
    (64, "db-migrations", "#dev-team", "Migration 0042 builds an index on `orders.created_at`:\n\n"
     "```sql\nCREATE INDEX CONCURRENTLY orders_created_at\n    ON orders (created_at DESC);\n"
     "```\n\n| | staging | production |\n|---|--:|--:|\n| up | 41 s | about 6 min |", None),
    (58, "human", "#dev-team", "Good. Who reviews 0042 before it goes out?", None),
    (55, "reviewer", "#dev-team",
     "I take it. One finding: the `down` step drops the wrong index.", 4),
    (47, "db-migrations", "#dev-team",
     "Right, fixed in 8d1e0c7. Up and down both run clean on a copy.", 4),
    (21, "frontend-dev", "backend-dev", "What do you send for an empty cart? I get a 500.", None),
    (18, "backend-dev", "frontend-dev",
     "422 with a sentence, deployed to staging. See https://shop.example/issues/118", 7),
    (4, "backend-dev", "human", "Staging is green: 214 tests, two migrations, no downtime. "
     "May I deploy to **production**?", None),
    (2, "human", "handbook", "Please update the orders chapter once 0042 is live.", None),
]
CHOICES = {9: ["Deploy now", "Tonight", "Not yet"]}  # by index of the message that offers them


class Stage:
    """The hub, and the agents' sockets that make them present."""

    def __init__(self, home: Path) -> None:
        self.home, self.port = home, 0
        self.config = home / "config.yaml"
        self.config.write_text("unseen_minutes: 0\n")  # no notices about a past that never was
        self.config.chmod(0o600)
        self.sessions: dict[str, str] = {}
        self.sockets: dict[str, ClientConnection] = {}
        self.stack = contextlib.ExitStack()

    def open(self) -> None:
        """Start the hub; on the same port the second time."""
        env = {k: v for k, v in os.environ.items() if not k.startswith("AGENT_")}
        self.log = open(self.home / "log", "w+b")  # noqa: SIM115
        self.hub = subprocess.Popen(
            [sys.executable, str(ROOT / "agent_chat.py"), "serve", "--port", str(self.port),
             "--db", str(self.home / "chat.db"), "--config", str(self.config)],
            env={**env, "HOME": str(self.home)}, stdout=self.log, stderr=self.log)
        end = time.monotonic() + 10
        while not (found := re.search(r"http://\S+?:(\d+)", (self.home / "log").read_text())):
            if time.monotonic() > end or self.hub.poll() is not None:
                raise SystemExit((self.home / "log").read_text())
            time.sleep(0.05)
        self.port = int(found[1])

    def close(self) -> None:
        self.stack.close()
        self.hub.terminate()
        self.hub.wait(10)
        self.log.close()

    def call(self, path: str, body: Any = None, agent: str = "") -> Any:
        headers = {"Content-Type": "application/json"}
        if agent:
            headers["X-Agent-Session"] = self.sessions.get(agent, "")
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            None if body is None else json.dumps(body).encode(),
            {key: value for key, value in headers.items() if value})
        return json.load(urllib.request.urlopen(request, timeout=10))

    def enter(self, absent: str = "") -> None:
        """The agents register and connect."""
        for name, groups, kind, host, cwd in AGENTS:
            if name == absent:
                continue
            body = {"name": name, "groups": groups, "type": kind, "host": host, "cwd": cwd,
                    "doors": ["tmux"]}
            self.sessions[name] = self.call("/api/register", body, name)["session"]
            if name != ABSENT:
                self.sockets[name] = self.stack.enter_context(connect(
                    f"ws://127.0.0.1:{self.port}/ws?agent={name}", proxy=None,
                    additional_headers={"X-Agent-Session": self.sessions[name]}))
        working = {"agent_name": "backend-dev", "status": "working"}
        self.call("/api/agents/status", working, "backend-dev")

    def ring(self, agent: str, ids: list[str], outcome: str) -> None:
        kind = "rung" if outcome == "rung" else "blocked"
        frame = {"type": kind, "ids": ids, "door": "tmux", "outcome": outcome}
        self.sockets[agent].send(json.dumps(frame))

    def play(self) -> None:
        ids: list[str] = []
        for minutes, sender, to, text, parent in TALK:
            target = {"group": to[1:]} if to[0] == "#" else {"to": to}
            reply = {} if parent is None else {"in_reply_to": ids[parent]}
            body: dict[str, object] = {"from": sender, "content": text}
            body.update(target)
            body.update(reply)
            if len(ids) in CHOICES:
                body["choices"] = CHOICES[len(ids)]
            sent = self.call("/api/send", body, sender)
            ids.append(sent["id"])
            for agent in {row["agent"] for row in sent["recipients"]} - {"human", ABSENT}:
                stuck = agent == STUCK and minutes < 60
                self.ring(agent, [sent["id"]], "draft" if stuck else "rung")
                time.sleep(0.05)  # the ring goes another way than the calls below
                if not stuck:
                    self.call(f"/api/messages?agent={agent}", agent=agent)
                    read = {"agent_name": agent, "message_ids": [sent["id"]]}
                    self.call("/api/messages/read", read, agent)

    def age(self) -> None:
        """The hub's clock is the only one; for a picture the past is written into its file."""
        self.close()
        now = datetime.now(UTC)
        with contextlib.closing(sqlite3.connect(self.home / "chat.db")) as db:
            for seq, (minutes, *_) in enumerate(TALK, 1):
                created = int((now - timedelta(minutes=minutes)).timestamp() * 1_000_000)
                db.execute("UPDATE messages SET created = ? WHERE seq = ?", (created, seq))
            db.commit()
        self.open()
        self.enter(ABSENT)
        self.ring(STUCK, [self.call("/api/messages/recent?limit=3")[2]["id"]], "draft")


def picture(url: str, output: Path, scheme: Literal["light", "dark"]) -> None:
    chromium = shutil.which("chromium") or "/usr/bin/chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=[
            "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync"])
        page = browser.new_page(viewport={"width": 1280, "height": 840}, color_scheme=scheme)
        page.goto(url)
        page.get_by_role("log").get_by_text("May I deploy").wait_for()
        page.get_by_role("combobox", name="To", exact=True).fill("backend-dev")
        page.get_by_role("textbox", name="Message").fill("Go ahead, I am here until it is through.")
        page.wait_for_timeout(1500)  # the rows of the agents come with the hub's tick
        page.screenshot(path=output)
        browser.close()


def main() -> None:
    words = [word for word in sys.argv[1:] if word != "--dark"]
    output = Path(words[0]) if words else ROOT / ".github" / "dashboard.png"
    output.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as home:
        stage = Stage(Path(home))
        stage.open()
        try:
            stage.enter()
            stage.play()
            time.sleep(0.3)
            stage.age()
            picture(f"http://127.0.0.1:{stage.port}/", output,
                    "dark" if "--dark" in sys.argv else "light")
        finally:
            stage.close()
    print(output, output.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
