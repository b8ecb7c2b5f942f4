#!/usr/bin/env python3
"""Makes .github/film.gif for the README: two agents in two tmux panes, and the dashboard.

    python3 .ci/film.py [OUTPUT.gif] [--frames FOLDER]

Everything in it is the real thing: a hub, two panes of a private tmux, the plugin in each of
them, its doorbell, the dashboard in Chromium. Only the two agents are scripted: a few lines of
Python in place of a model, with the prompt that the bell looks for. What is seen is
photographed as it happens; a picture that differs from the last one becomes a frame.

Needs playwright and a Chromium, tmux, ImageMagick and gifsicle (Debian: apt-get install tmux
chromium imagemagick gifsicle fonts-inter fonts-jetbrains-mono).
"""

from __future__ import annotations

import base64
import contextlib
import html
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from load import Plugin, Process, free_port

HERE = Path(__file__).resolve()
ROOT = HERE.parent.parent
WIDTH, HEIGHT = 1000, 600
LEFT = 440  # of it for the panes
PANE_COLUMNS, PANE_ROWS = 53, 15
PORT = 9420  # as a reader will see it, if it is free
MOST_BYTES = 1_000_000
LONGEST = 1.6  # seconds that a picture may stand; waiting is not worth looking at
SHORTEST = 0.1
CHROMIUM_FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
                  "--disable-background-networking", "--force-device-scale-factor=1"]
COLORS = ["#3b4252", "#f07178", "#a6da95", "#e5c07b", "#7aa2f7", "#c099ff", "#7dcfff", "#c8d0e0"]


class Role(NamedTuple):
    """What one of the two agents is called, and what it says."""

    name: str
    title: str
    asks: str  # to the other one, when its user asks
    answers: str  # when the other one asks
    concludes: str  # to its own user, when the answer came
    obeys: str  # to the human at the dashboard


ROLES = {
    "claude-shop-api": Role(
        "claude-shop-api", "shop-api", "What are you working on? I am about to change GET /orders",
        "", "codex-shop-web wants total_count in it. It is for you to decide.",
        "Done, with a test: 3f9c2ab"),
    "codex-shop-web": Role(
        "codex-shop-web", "shop-web", "",
        "The order list. It needs total_count to page by", "", ""),
}


# -- an agent in its pane


class Composer:
    """The bottom of the pane: a prompt that a person types at, and the bell pastes into."""

    PROMPT = "\x1b[1;35m❯\x1b[0m "

    def __init__(self) -> None:
        import termios
        import tty

        self.old = termios.tcgetattr(0)
        tty.setraw(0)
        os.write(1, b"\x1b[?2004h" + self.PROMPT.encode())  # bracketed paste, please

    def line(self) -> str:
        """What stands in it when Enter is pressed."""
        typed = ""
        data = b""
        while True:
            data += os.read(0, 4096)
            text = data.decode("utf-8", "ignore").replace("\x1b[200~", "").replace("\x1b[201~", "")
            data = b""
            for character in text:
                if character in "\r\n":
                    return typed
                typed += character
                os.write(1, character.encode())

    def say(self, text: str, color: str = "0") -> None:
        """A line above the prompt."""
        shown = "\r\n".join(textwrap.wrap(text, PANE_COLUMNS - 1, subsequent_indent="  "))
        os.write(1, f"\r\x1b[K\x1b[{color}m{shown}\x1b[0m\r\n{self.PROMPT}".encode())

    def keep(self, line: str) -> None:
        """The submitted line goes into the history."""
        color = "33" if line.startswith("[agent-chat]") else "1"
        above = (len(line) + 2) // PANE_COLUMNS  # rows that it was wrapped over
        up = f"\x1b[{above}A" if above else ""
        os.write(1, f"{up}\r\x1b[J".encode())
        self.say("> " + re.sub(r" #[0-9a-f]{4}$", "", line), color)
        self.say("")


def play_agent(name: str, url: str, folder: str) -> None:
    """The program in a pane: it does what a model would, with our tools."""
    role = ROLES[name]
    composer = Composer()
    plugin = Plugin(url, folder, name)
    (Path(folder) / "ready").touch()

    def call(tool: str, **arguments: object) -> Any:
        about = f"{arguments['to']}: {arguments['content']}" if "to" in arguments else ""
        composer.say(f"● {tool}({about})", "36")
        time.sleep(0.5)
        result = plugin.call("tools/call", {"name": tool, "arguments": arguments})
        return json.loads(result["content"][0]["text"])

    while True:
        line = composer.line()
        composer.keep(line)
        time.sleep(0.4)
        if not line.startswith("[agent-chat]"):
            call("list_agents")
            call("send_message", to="codex-shop-web", content=role.asks)
            composer.say("Asked. I go on, and hear when it answers.")
            composer.say("")
            continue
        for message in call("check_messages", mark_read=True)["messages"]:
            sender = message.get("from") or message["from_agent"]
            text = message["content"]
            composer.say(f"  {sender}: {text}", "2")
            time.sleep(0.6)
            if sender == "human":
                call("send_message", to="human", content=role.obeys, reply_to=message["id"])
                composer.say("")
            elif message.get("in_reply_to"):
                composer.say(role.concludes)
                composer.say("")
            else:
                call("send_message", to=sender, content=role.answers, reply_to=message["id"])
                composer.say("")


# -- the stage: both panes and the page, side by side

STAGE = """<!doctype html><meta charset="utf-8"><style>
body { margin: 0; width: @WIDTH@px; height: @HEIGHT@px; background: #12151c; display: grid;
  grid-template: 1fr 1fr / @LEFT@px 1fr; gap: 8px; padding: 8px; box-sizing: border-box }
section { background: #1a1e28; border-radius: 8px; overflow: hidden; color: #c8d0e0 }
h1 { margin: 0; padding: 6px 12px; font: 600 12px Inter, sans-serif; color: #8a93a6;
  background: #222734 }
pre { margin: 8px 12px; font: 13px/16.4px "JetBrains Mono", "DejaVu Sans Mono", monospace }
#page { grid-area: 1 / 2 / 3 / 3; background: #fff }
img { display: block; width: 100% }
</style>
<section><h1>tmux: the agent in ~/src/shop-api</h1><pre id="one"></pre></section>
<section><h1>tmux: the agent in ~/src/shop-web</h1><pre id="two"></pre></section>
<section id="page"><h1>@URL@</h1><img id="shot"></section>"""
PAGE_WIDTH, PAGE_HEIGHT = WIDTH - LEFT - 24, HEIGHT - 16 - 27
SHOW = """([one, two, shot]) => {
  document.getElementById('one').innerHTML = one;
  document.getElementById('two').innerHTML = two;
  const image = document.getElementById('shot');
  image.src = shot;
  return image.decode();
}"""


class Panes:
    """A private tmux with one session for each agent."""

    def __init__(self, folder: Path) -> None:
        self.socket = str(folder / "tmux")
        self.ids: list[str] = []

    def run(self, *words: str) -> str:
        env = {key: value for key, value in os.environ.items() if not key.startswith("TMUX")}
        done = subprocess.run(["tmux", "-uS", self.socket, "-f", os.devnull, *words], env=env,
                              capture_output=True, text=True, check=True)
        return done.stdout.rstrip("\n")

    def open(self, name: str, url: str, folder: Path) -> None:
        folder.mkdir(parents=True)
        words = ["sh", "-c", 'exec "$@" 2>log', "sh",
                 sys.executable, str(HERE), "agent", name, url, str(folder)]
        self.ids.append(self.run("new-session", "-d", "-PF#{pane_id}", "-x", str(PANE_COLUMNS),
                                 "-y", str(PANE_ROWS), "-c", str(folder), *words))

    def type(self, pane: int, text: str) -> None:
        self.run("send-keys", "-t", self.ids[pane], "-l", text)

    def enter(self, pane: int) -> None:
        self.run("send-keys", "-t", self.ids[pane], "Enter")

    def screen(self, pane: int) -> str:
        """What the pane shows, as HTML with its colours and its caret."""
        text = self.run("capture-pane", "-ep", "-t", self.ids[pane])
        x, y = self.run("display", "-p", "-t", self.ids[pane], "#{cursor_x} #{cursor_y}").split()
        lines = [as_html(line) for line in text.split("\n")]
        lines += [""] * (int(y) + 1 - len(lines))
        plain = re.sub("<[^>]*>", "", html.unescape(lines[int(y)]))
        caret = '<span style="background:#c099ff"> </span>'
        lines[int(y)] += " " * (int(x) - len(plain)) + caret
        return "\n".join(lines)

    def close(self) -> None:
        with contextlib.suppress(subprocess.CalledProcessError):
            self.run("kill-server")


def as_html(line: str) -> str:
    """One line of `capture-pane -e`: the few attributes that our agents use."""
    shown, style = "", ""
    for piece in re.split(r"(\x1b\[[0-9;]*m)", line):
        if not piece.startswith("\x1b"):
            shown += f'<span style="{style}">{html.escape(piece)}</span>' if piece else ""
            continue
        for code in piece[2:-1].split(";"):
            if code in ("", "0", "39"):
                style = ""
            elif code == "1":
                style += "font-weight:600;"
            elif code == "2":
                style += "color:#8a93a6;"
            elif re.fullmatch("3[0-7]", code):
                style += f"color:{COLORS[int(code) - 30]};"
    return shown


class Camera:
    """Photographs the stage, and keeps what differs from the last picture."""

    def __init__(self, browser: Any, url: str, panes: Panes, folder: Path) -> None:
        self.page = browser.new_page(viewport={"width": PAGE_WIDTH, "height": PAGE_HEIGHT},
                                     color_scheme="light", reduced_motion="reduce")
        self.page.goto(url)
        self.stage = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        self.stage.set_content(STAGE.replace("@URL@", "http://127.0.0.1:9420")
                               .replace("@WIDTH@", str(WIDTH)).replace("@LEFT@", str(LEFT))
                               .replace("@HEIGHT@", str(HEIGHT)))
        self.panes, self.folder = panes, folder
        self.frames: list[tuple[Path, float]] = []
        self.last: tuple[str, str, bytes] = ("", "", b"")
        self.since = time.monotonic()

    def shoot(self, stand: float = 0) -> None:
        """One picture; `stand` is how long it stands, if it is to be read."""
        seen = (self.panes.screen(0), self.panes.screen(1), self.page.screenshot())
        if seen != self.last:
            one, two, shot = seen
            address = "data:image/png;base64," + base64.b64encode(shot).decode()
            self.stage.evaluate(SHOW, [one, two, address])
            self.finish()
            path = self.folder / f"{len(self.frames):03}.png"
            self.stage.screenshot(path=path)
            self.frames.append((path, 0.0))
            self.last, self.since = seen, time.monotonic()
        if stand:
            path, _ = self.frames[-1]
            self.frames[-1] = (path, stand)

    def finish(self) -> None:
        """How long the last picture stood, if it was not told."""
        if self.frames and not self.frames[-1][1]:
            path, _ = self.frames[-1]
            passed = min(LONGEST, max(SHORTEST, time.monotonic() - self.since))
            self.frames[-1] = (path, passed)

    def until(self, text: str, pane: int | None = None, seconds: float = 90) -> None:
        """Films until that is to be seen in a pane, or on the page."""
        end = time.monotonic() + seconds
        while True:
            self.shoot()
            seen = (self.panes.run("capture-pane", "-Jp", "-t", self.panes.ids[pane])
                    if pane is not None else self.page.inner_text("body"))
            if text in " ".join(seen.split()):
                return
            if time.monotonic() > end:
                raise SystemExit(f"{text!r} did not come; the pane shows:\n{seen}")

    def type(self, pane: int, text: str) -> None:
        """A person types at a pane."""
        for piece in re.findall(r".{1,4}", text):
            self.panes.type(pane, piece)
            time.sleep(0.05)
            self.shoot(0.12)

    def write(self, text: str) -> None:
        """A person types into the page's message box."""
        box = self.page.get_by_role("textbox", name="Message")
        for piece in re.findall(r".{1,4}", text):
            box.press_sequentially(piece)
            self.shoot(0.12)


def play(camera: Camera) -> None:
    """The story, about twenty seconds of it."""
    page = camera.page
    page.get_by_text("codex-shop-web").first.wait_for(state="attached")
    page.wait_for_timeout(1500)  # the rows of the agents come with the hub's tick
    camera.shoot(1.2)
    camera.type(0, "ask the agent in shop-web what it is working on")
    camera.shoot(0.6)
    camera.panes.enter(0)
    camera.until("I go on, and hear", 0)
    camera.until("[agent-chat] Call check_messages", 1)
    camera.shoot(1.6)
    camera.until("total_count to page by", 1)
    camera.until("REPLY received", 0)
    camera.shoot(1.6)
    camera.until("for you to decide.", 0)
    camera.shoot(1.8)
    page.get_by_role("combobox", name="To", exact=True).fill("claude-shop-api")
    camera.write("Please add total_count.")
    camera.shoot(0.6)
    page.get_by_role("textbox", name="Message").press("Enter")
    camera.until("from human", 0)
    camera.until("3f9c2ab")
    page.wait_for_timeout(800)
    camera.shoot(4)


# -- the film


def tool(*names: str) -> str:
    """The first of some programs that is installed."""
    for name in names:
        found = shutil.which(name)
        if found:
            return found
    raise SystemExit(f"{names[-1]} is not installed")


def develop(frames: list[tuple[Path, float]], output: Path) -> None:
    """One GIF of all pictures: what stays the same between two of them costs nothing."""
    convert = tool("magick", "convert-im6.q16", "convert")
    words: list[str] = []
    for path, seconds in frames:
        words += ["-delay", str(round(seconds * 100)), str(path)]
    raw = output.with_suffix(".raw.gif")
    subprocess.run([convert, *words, "+dither", "-colors", "128", "-loop", "0", str(raw)],
                   check=True)
    for colors, lossy in ((96, 20), (64, 40), (48, 80), (32, 120)):
        subprocess.run([tool("gifsicle"), "-O3", f"--lossy={lossy}", f"--colors={colors}",
                        str(raw), "-o", str(output)], check=True, stderr=subprocess.DEVNULL)
        if output.stat().st_size < MOST_BYTES:
            break
    raw.unlink()


def is_free(port: int) -> bool:
    """Whether a hub could listen there."""
    with socket.socket() as probe:
        return bool(probe.connect_ex(("127.0.0.1", port)))


@contextlib.contextmanager
def theatre(home: Path) -> Iterator[tuple[Process, Panes]]:
    """A hub, and both agents in their panes, connected."""
    port = PORT if is_free(PORT) else free_port()
    words = [sys.executable, str(ROOT / "agent_chat.py"), "serve", "--port", str(port),
             "--db", str(home / "chat.db")]
    server = Process(words, port, str(home))
    panes = Panes(home)
    try:
        for name, role in ROLES.items():
            panes.open(name, server.url, home / role.title)
        end = time.monotonic() + 120
        while not all((home / role.title / "ready").exists() for role in ROLES.values()):
            if time.monotonic() > end:
                raise SystemExit("the agents did not start")
            time.sleep(0.1)
        time.sleep(1.5)  # until both hold their sockets
        yield server, panes
    finally:
        panes.close()
        server.stop()


def main() -> None:
    """Films, develops, and says how large the film is."""
    from playwright.sync_api import sync_playwright

    words = sys.argv[1:]
    keep = Path(words.pop()) if "--frames" in words else None
    if keep:
        words.remove("--frames")
    output = Path(words[0]) if words else ROOT / ".github" / "film.gif"
    with tempfile.TemporaryDirectory(prefix="film-") as scratch:
        home = Path(scratch)
        pictures = keep or home / "frames"
        pictures.mkdir(parents=True, exist_ok=True)
        with theatre(home) as (server, panes), sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=tool("google-chrome", "chromium"), args=CHROMIUM_FLAGS)
            camera = Camera(browser, server.url, panes, pictures)
            play(camera)
            browser.close()
        develop(camera.frames, output)
    length = sum(seconds for _, seconds in camera.frames)
    print(f"{output}: {len(camera.frames)} frames, {length:.0f} s, "
          f"{output.stat().st_size:,} bytes")


if __name__ == "__main__":
    if sys.argv[1:2] == ["agent"]:
        play_agent(*sys.argv[2:5])
    else:
        main()
