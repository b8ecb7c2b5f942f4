#!/usr/bin/env python3
"""Measurements of agent-chat: every row of the table in section 10 of the design, in one run.

    .ci/bench.py                 all rows, under 3 minutes: a table, then one JSON line
    .ci/bench.py --quick         the same, smaller and noisier, in half a minute
    .ci/bench.py --only send     one part: send inbox big push fanout memory start plugin bell
    .ci/bench.py --scale         how it grows: connected agents, stored messages, group sizes
    .ci/bench.py --soak 10       50 messages a second for so many minutes: does anything creep?

The machine's speed drifts by 1.6x, so nothing here is an absolute number: in the same minute
the bench takes its own yardsticks (a fixed Python loop, the disk's sync rate, a bare http.server,
a bare selectors loop, a bare SQLite insert) and goals are scaled by them. `calib` is the time
of that loop, 8 ms where the figures of the design were taken. Hub on core 0, load on core 1.
Loopback only; its own HOME, database and ports; it ends what it started.
Needs the standard library, wrk (Debian package) and what the program itself needs.
"""

from __future__ import annotations

import argparse
import contextlib
import http.server
import importlib.util
import json
import os
import random
import resource
import select
import selectors
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

HERE = os.path.dirname(os.path.abspath(__file__))
PROGRAM = os.path.join(os.path.dirname(HERE), "agent_chat.py")
CALIB_MS = 8.0  # of the machine in the state in which the Go server did GO_RATES
GO_RATES = {"send 64": 7800, "send 8": 6850, "inbox 64": 7630}  # requests a second
LUA = """
local kind, from, to, size = ...
function init(a)
  if a[1] == "send" then
    local head = '{"from":"' .. a[2] .. '","to":"' .. a[3] .. '","content":"'
    wrk.method, wrk.body = "POST", head .. string.rep("x", 198 - #head) .. '"}'
    wrk.headers["Content-Type"] = "application/json"
  end
  request_bytes = wrk.format()
end
function request() return request_bytes end
function done(s, l, r)
  io.write(string.format('RESULT {"n":%d,"rps":%.1f,"p50":%.3f,"p99":%.3f,"errors":%d}\\n',
    s.requests, s.requests / s.duration * 1e6, l:percentile(50) / 1e3, l:percentile(99) / 1e3,
    s.errors.connect + s.errors.read + s.errors.write + s.errors.status + s.errors.timeout))
end
"""


class Row(NamedTuple):
    """One line of the table. `ratio` is measured / goal, turned so that 1 or more is good."""

    work: str
    measured: str
    goal: str
    ratio: float
    figures: dict[str, Any]


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def milliseconds(values: Sequence[float]) -> dict[str, float]:
    """Seconds in; n, p50, p99 and the largest in milliseconds out."""
    return {"n": len(values), "p50": round(percentile(values, 0.5) * 1000, 3),
            "p99": round(percentile(values, 0.99) * 1000, 3),
            "max": round(max(values) * 1000, 3)}


def pin(core: int) -> None:
    if (os.cpu_count() or 1) > 1:
        os.sched_setaffinity(0, {core})


# -- yardsticks


def calib() -> float:
    """Milliseconds for a fixed Python loop: how fast this machine is right now."""
    best = 1e9
    for _ in range(3):
        started, total = time.perf_counter(), 0
        for number in range(300_000):
            total += number & 7
        best = min(best, time.perf_counter() - started)
    return best * 1000


def disk_sync(folder: str, seconds: float) -> dict[str, float]:
    """How often a second the disk takes 4 KiB more of a file for certain."""
    times: list[float] = []
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        end = time.perf_counter() + seconds
        while (started := time.perf_counter()) < end:
            file.write(b"x" * 4096)
            os.fdatasync(file.fileno())
            times.append(time.perf_counter() - started)
    return {"rate": len(times) / sum(times), **milliseconds(times)}


def bare_insert(folder: str, seconds: float) -> dict[str, float]:
    """Rows a second into one plain table with FULL sync: 1 and 64 a transaction."""
    rates = {}
    for batch in (1, 64):
        path = os.path.join(folder, f"bare{batch}.db")
        connection = sqlite3.connect(path, isolation_level=None)
        connection.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL;"
                                 "CREATE TABLE t (a INTEGER PRIMARY KEY, b TEXT, c TEXT)")
        rows, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            connection.execute("BEGIN")
            connection.executemany("INSERT INTO t (b, c) VALUES (?,?)", [("b", "x" * 140)] * batch)
            connection.execute("COMMIT")
            rows += batch
        rates[f"by {batch}"] = rows / (time.perf_counter() - started)
        connection.close()
    return rates


class Echo(http.server.BaseHTTPRequestHandler):
    """The least that http.server can do with a POST."""

    protocol_version = "HTTP/1.1"
    wbufsize, disable_nagle_algorithm = 1 << 16, True

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_request(self, code: Any = "-", size: Any = "-") -> None:
        pass


def serve_echo(kind: str, port: int) -> None:
    """Child process: a bare http.server, or a bare selectors loop, until it is killed."""
    if kind == "http":
        server = type("Server", (http.server.ThreadingHTTPServer,), {"request_queue_size": 1024})
        server(("127.0.0.1", port), Echo).serve_forever()
    loop = selectors.DefaultSelector()
    listening = socket.create_server(("127.0.0.1", port), backlog=1024)
    loop.register(listening, selectors.EVENT_READ)
    while True:
        for key, _ in loop.select():
            if key.fileobj is listening:
                client = listening.accept()[0]
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                loop.register(client, selectors.EVENT_READ, client)
            elif data := key.data.recv(1 << 16):
                body = data[data.index(b"\r\n\r\n") + 4:]
                key.data.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b"
                              % (len(body), body))
            else:
                loop.unregister(key.data)
                key.data.close()


# -- the hub, and what talks to it


class Process:
    """A child on core 0 that answers on a port of its own."""

    def __init__(self, words: Sequence[str], port: int, folder: str) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        env = {key: value for key, value in os.environ.items() if not key.startswith("AGENT_")}
        self.started = time.perf_counter()
        self.child = subprocess.Popen(
            words, env=dict(env, HOME=folder), stdin=subprocess.DEVNULL, cwd=folder,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=lambda: pin(0))
        self.pid = self.child.pid
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), 1).close()
                return
            if self.child.poll() is not None:
                raise SystemExit(f"{' '.join(words)} ended with {self.child.returncode}")
            time.sleep(0.001)

    def stop(self) -> None:
        self.child.terminate()
        try:
            self.child.wait(10)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()

    def cpu(self) -> float:
        """Seconds of processor time so far."""
        with open(f"/proc/{self.pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def status(self, pid: int = 0) -> dict[str, float]:
        """RSS in MiB, threads and open files."""
        pid = pid or self.pid
        with open(f"/proc/{pid}/status") as file:
            lines = dict(line.split(":", 1) for line in file)
        return {"rss": round(int(lines["VmRSS"].split()[0]) / 1024, 1),
                "threads": int(lines["Threads"]), "fds": len(os.listdir(f"/proc/{pid}/fd"))}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def scratch(where: str | None = None) -> Iterator[str]:
    folder = tempfile.mkdtemp(prefix="agent-chat-bench-", dir=where)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def hub(folder: str, db: str = "hub.db") -> Iterator[Process]:
    port = free_port()
    server = Process([sys.executable, PROGRAM, "serve", "--port", str(port), "--db",
                      os.path.join(folder, db)], port, folder)
    try:
        Http(port).get("/health")
        yield server
    finally:
        server.stop()


class Http:
    """One keep-alive connection; `ask` returns the decoded answer and how long it took."""

    def __init__(self, port: int) -> None:
        self.host = f"127.0.0.1:{port}"
        self.sock = socket.create_connection(("127.0.0.1", port), 60)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, path: str, body: Any = None) -> None:
        data = b"" if body is None else json.dumps(body).encode()
        extra = ("" if body is None else
                 f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n")
        self.sock.sendall(f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\n"
                          f"Host: {self.host}\r\n{extra}\r\n".encode() + data)

    def receive(self) -> bytes:
        data = b""
        while b"\r\n\r\n" not in data:
            data += self.sock.recv(1 << 20)
        head, _, body = data.partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
        while len(body) < length:
            body += self.sock.recv(1 << 20)
        if b" 200 " not in head[:14]:
            raise SystemExit(f"the hub answered {head[:40]!r} {body[:200]!r}")
        return body

    def ask(self, path: str, body: Any = None) -> tuple[Any, float]:
        started = time.perf_counter()
        self.send(path, body)
        answer = self.receive()
        return json.loads(answer), time.perf_counter() - started

    def get(self, path: str) -> Any:
        return self.ask(path)[0]

    def post(self, path: str, **body: Any) -> Any:
        return self.ask(path, body)[0]

    def times(self, count: int, path: str, body: Any = None) -> dict[str, float]:
        return milliseconds([self.ask(path, body)[1] for _ in range(count)])


class Frames:
    """A raw WebSocket client: cheap enough to have thousands, and never in the way."""

    def __init__(self, port: int, agent: str) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), 30)
        self.sock.sendall(f"GET /ws?agent={agent} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: "
                          "websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
                          "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode())
        data = b""
        while b"\r\n\r\n" not in data:
            data += self.sock.recv(1 << 16)
        if b" 101 " not in data[:14]:
            raise SystemExit(f"no WebSocket: {data[:200]!r}")
        self.rest = data.partition(b"\r\n\r\n")[2]

    def read(self) -> list[bytes]:
        """The text frames that one recv brings; pings are answered."""
        data, at, texts = self.rest + self.sock.recv(1 << 18), 0, []
        while len(data) - at >= 2:
            size, start = data[at + 1], at + 2
            if size == 126:
                size, start = int.from_bytes(data[at + 2:at + 4], "big"), at + 4
            elif size == 127:
                size, start = int.from_bytes(data[at + 2:at + 10], "big"), at + 10
            if len(data) < start + size:
                break
            if data[at] & 15 == 1:
                texts.append(data[start:start + size])
            elif data[at] & 15 == 9:
                self.sock.sendall(b"\x8a\x80\0\0\0\0")
            at = start + size
        self.rest = data[at:]
        return texts


class Crowd:
    """Many connected agents, registered in one group, read in one epoll loop."""

    def __init__(self, port: int, count: int, group: str = "crowd") -> None:
        http_client = Http(port)
        self.poll, self.frames = select.epoll(), {}
        for number in range(count):
            http_client.post("/api/register", name=f"{group}{number}", groups=[group])
            frames = Frames(port, f"{group}{number}")
            self.frames[frames.sock.fileno()] = frames
            self.poll.register(frames.sock, select.EPOLLIN)

    def collect(self, tag: bytes, expected: int, patience: float) -> list[float]:
        """When each of the expected frames came; fewer if nothing came for `patience` s."""
        came: list[float] = []
        while len(came) < expected:
            ready = self.poll.poll(patience)
            if not ready:
                break
            for number, _ in ready:
                texts = self.frames[number].read()
                came += [time.perf_counter()] * sum(tag in text for text in texts)
        return came

    def drain_until(self, done: Callable[[], bool]) -> None:
        while not done():
            for number, _ in self.poll.poll(0.05):
                self.frames[number].read()

    def close(self) -> None:
        for frames in self.frames.values():
            frames.sock.close()


def wrk(folder: str, url: str, connections: int, seconds: int, *words: str,
        crowd: Crowd | None = None) -> dict[str, float]:
    """One closed-loop run; `crowd` is read meanwhile."""
    script = os.path.join(folder, "load.lua")
    with open(script, "w") as file:
        file.write(LUA)
    child = subprocess.Popen(["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "-s", script,
                              url, "--", *words], stdout=subprocess.PIPE, text=True)
    if crowd:
        crowd.drain_until(lambda: child.poll() is not None)
    output = child.communicate()[0]
    for line in output.splitlines():
        if line.startswith("RESULT "):
            result: dict[str, float] = json.loads(line[7:])
            return result
    raise SystemExit(f"wrk failed: {output}")


def load(server: Process, folder: str, name: str, connections: int, plan: Plan,
         ) -> dict[str, float]:
    """The best of some runs: the least disturbed. `speed` is rps x calib, free of drift."""
    words = ("send", "alice", "bob") if name == "send" else ("get",)
    path = "/api/send" if name == "send" else "/api/messages?agent=bob"
    best: dict[str, float] = {}
    for _ in range(plan.rounds):
        before, cpu = calib(), server.cpu()
        run = wrk(folder, server.url + path, connections, plan.seconds, *words)
        run["us"] = round((server.cpu() - cpu) / max(run["n"], 1) * 1e6, 1)
        run["calib"] = min(before, calib())
        run["speed"] = round(run["rps"] * run["calib"])
        if run["speed"] > best.get("speed", 0):
            best = run
    return best


# -- the rows of the table


class Plan(NamedTuple):
    """How much of everything; the other one is --quick."""

    seconds: int = 5
    rounds: int = 2
    stored: int = 1_000_000
    burst: int = 500
    repeats: int = 10


QUICK = Plan(seconds=2, rounds=1, stored=100_000, burst=50, repeats=3)


class Bench:
    """Runs parts; each part appends its rows."""

    def __init__(self, plan: Plan, folder: str) -> None:
        self.plan, self.folder = plan, folder
        self.rows: list[Row] = []
        self.yardsticks: dict[str, Any] = {}

    def row(self, work: str, measured: str, goal: str, ratio: float, **figures: Any) -> None:
        row = Row(work, measured, goal, round(ratio, 2), figures)
        self.rows.append(row)
        verdict = "" if not goal else "met" if row.ratio >= 1 else "MISSED"
        print(f"{work:44} {measured:34} {goal:32} {verdict and f'{row.ratio:5.2f}'} {verdict}",
              flush=True)

    def measure_yardsticks(self) -> None:
        seconds, port = min(self.plan.seconds, 2), free_port()
        self.yardsticks = {"calib_ms": round(calib(), 2), "cores": os.cpu_count(),
                           "disk": disk_sync(self.folder, seconds),
                           "sqlite": bare_insert(self.folder, seconds / 2)}
        for kind in ("http", "raw"):
            port = free_port()
            echo = Process([sys.executable, __file__, "--echo", kind, str(port)], port,
                           self.folder)
            try:
                self.yardsticks[kind] = {n: wrk(self.folder, echo.url, n, seconds, "send", "a",
                                                "b")["rps"] for n in (1, 64)}
            finally:
                echo.stop()
        stick = self.yardsticks
        self.row("yardstick: Python loop", f"{stick['calib_ms']:.2f} ms", "", 1)
        self.row("yardstick: disk, 4 KiB and sync", f"{stick['disk']['rate']:,.0f}/s, p50 "
                 f"{stick['disk']['p50']} ms", "", 1)
        self.row("yardstick: SQLite insert, 1 / 64 a commit",
                 f"{stick['sqlite']['by 1']:,.0f} / {stick['sqlite']['by 64']:,.0f} per s", "", 1)
        self.row("yardstick: echo, http.server, 1 / 64 conn.",
                 f"{stick['http'][1]:,.0f} / {stick['http'][64]:,.0f} per s", "", 1)
        self.row("yardstick: echo, selectors, 1 / 64 conn.",
                 f"{stick['raw'][1]:,.0f} / {stick['raw'][64]:,.0f} per s", "", 1)

    def rate_row(self, work: str, key: str, factor: float, p99: float,
                 run: dict[str, float]) -> None:
        goal = factor * GO_RATES[key] * CALIB_MS / run["calib"]
        text = f">= {goal:,.0f}/s ({factor}x Go)" + (f", p99 <= {p99:g} ms" if p99 else "")
        ratio = min(run["rps"] / goal, p99 / run["p99"] if p99 else 9)
        echo = self.yardsticks["raw"][64]
        self.row(work, f"{run['rps']:,.0f}/s, p99 {run['p99']:.1f} ms", text, ratio,
                 of_raw_echo=round(run["rps"] / echo, 3), **run)

    def part_send(self) -> None:
        with scratch(self.folder) as folder, hub(folder) as server:
            for name in ("alice", "bob"):
                Http(server.port).post("/api/register", name=name, groups=[])
            run = load(server, folder, "send", 64, self.plan)
            self.rate_row("POST /api/send, 64 connections", "send 64", 2.5, 10, run)
            run = load(server, folder, "send", 8, self.plan)
            self.rate_row("POST /api/send, 8 connections", "send 8", 1.4, 4, run)
            disk = disk_sync(self.folder, 1)
            run = load(server, folder, "send", 1, self.plan)
            share = run["rps"] / disk["rate"]
            self.row("POST /api/send, 1 connection", f"{run['rps']:,.0f}/s = {share:.0%} of disk",
                     ">= 55% of the disk's sync rate", share / 0.55,
                     disk=disk["rate"], **run)

    def part_inbox(self) -> None:
        with scratch(self.folder) as folder, hub(folder) as server:
            client = Http(server.port)
            for name in ("alice", "bob"):
                client.post("/api/register", name=name, groups=[])
            for _ in range(20):
                client.post("/api/send", **{"from": "alice", "to": "bob", "content": "y" * 140})
            run = load(server, folder, "inbox", 64, self.plan)
            self.rate_row("GET /api/messages, 20 unread, 64 conn.", "inbox 64", 1.3, 0, run)

    def part_big(self) -> None:
        stored = self.plan.stored
        with scratch(self.folder) as folder:
            fill(os.path.join(folder, "hub.db"), stored)
            with hub(folder) as server:
                figures = ask_everything(server, self.plan.repeats * 50)
        unread, sent = figures["unread 20"], figures["send while polled"]
        self.row(f"GET 20 unread at {stored:,} stored",
                 f"p50 {unread['p50']:.2f}, p99 {unread['p99']:.2f} ms", "p50 <= 1, p99 < 5 ms",
                 min(1 / unread["p50"], 5 / unread["p99"]), **figures)
        self.row("send while a client polls, there", f"p50 {sent['p50']:.2f} ms, p99 "
                 f"{sent['p99']:.2f} ms", "p50 <= 2 ms", 2 / sent["p50"])

    def part_push(self) -> None:
        with scratch(self.folder) as folder, hub(folder) as server:
            crowd, client = Crowd(server.port, 1), Http(server.port)
            delays = []
            for number in range(self.plan.repeats * 100):
                started = time.perf_counter()
                client.send("/api/send", {"from": "alice", "to": "crowd0",
                                          "content": f"push-{number}- " + "z" * 130})
                delays.append(crowd.collect(b"push-%d-" % number, 1, 5)[0] - started)
                client.receive()
            result, disk = milliseconds(delays), disk_sync(self.folder, 0.5)
            goal = disk["p50"] + 0.5
            self.row("push: POST to frame at the recipient", f"p50 {result['p50']:.2f}, p99 "
                     f"{result['p99']:.2f} ms", f"p50 <= {goal:.2f} ms (a sync + 0.5)",
                     goal / result["p50"], **result)
            crowd.close()

    def part_fanout(self) -> None:
        """1,000 sockets in one group: memory, one message, a burst."""
        with scratch(self.folder) as folder, hub(folder) as server:
            client = Http(server.port)
            time.sleep(0.5)
            idle = server.status()["rss"]
            crowd = Crowd(server.port, 1000)
            time.sleep(0.5)
            full = server.status()
            self.row("hub memory, idle / with 1,000 sockets", f"{idle} / {full['rss']} MiB",
                     "<= 32 / 40 MiB", min(32 / idle, 40 / full["rss"]), **full)
            last = fan_out(client, crowd, self.plan.repeats * 2)
            burst = {"from": "alice", "group": "crowd", "content": "burst " + "z" * 130}
            sender = threading.Thread(target=lambda: [
                client.ask("/api/send", burst) for _ in range(self.plan.burst)])
            sender.start()
            expected, started = 1000 * self.plan.burst, time.perf_counter()
            came = crowd.collect(b'"burst ', expected, 5)
            sender.join()
            lost, after = expected - len(came), server.status()["rss"]
            self.row("fan-out to 1,000 sockets, the last one", f"p50 {last['p50']:.1f} ms, "
                     f"{lost} of {expected:,} lost", "<= 25 ms, none lost in a burst",
                     0 if lost else 25 / last["p50"], lost=lost, rss_after_burst=after,
                     frames_per_s=round(len(came) / (max(came) - started)), **last)
            crowd.close()

    def part_start(self) -> None:
        times = []
        for _ in range(self.plan.repeats):
            with scratch(self.folder) as folder, hub(folder) as server:
                times.append(time.perf_counter() - server.started)
        result = milliseconds(times)
        self.row("serve: start to first /health", f"p50 {result['p50']:.0f} ms", "<= 120 ms",
                 120 / result["p50"], **result)
        with scratch(self.folder) as folder, hub(folder) as server:
            for name in ("alice", "bob"):
                Http(server.port).post("/api/register", name=name)
            for words, goal in ((["--help"], 30), (["inbox", "bob"], 60),
                                (["send", "bob", "hi"], 60)):
                env = dict(os.environ, HOME=folder, AGENT_CHAT_SERVER=server.url)
                times = []
                for _ in range(self.plan.repeats):
                    began = time.perf_counter()
                    subprocess.run([sys.executable, PROGRAM, *words], env=env, check=True,
                                   capture_output=True, cwd=folder)
                    times.append(time.perf_counter() - began)
                result = milliseconds(times)
                self.row(f"command line: {words[0]}", f"p50 {result['p50']:.0f} ms",
                         f"<= {goal} ms", goal / result["p50"], **result)

    def part_plugin(self) -> None:
        with scratch(self.folder) as folder, hub(folder) as server:
            times, memory = [], 0.0
            for number in range(self.plan.repeats + 1):
                plugin = Plugin(server.url, folder, f"plugin{number}")
                if number:  # the first one compiles
                    times.append(plugin.initialized)
                    memory = max(memory, server.status(plugin.child.pid)["rss"])
                plugin.close()
            result = milliseconds(times)
            self.row("plugin: exec to initialize; memory", f"p50 {result['p50']:.0f} ms; "
                     f"{memory} MiB", "<= 600 ms; <= 60 MiB",
                     min(600 / result["p50"], 60 / memory), **result)

    def part_bell(self) -> None:
        """A real tmux pane with a small agent in it; the plugin types into it."""
        tmux = ["tmux", "-L", f"bench-{os.getpid()}", "-f", "/dev/null"]
        with scratch(self.folder) as folder, hub(folder) as server:
            lines, client = os.path.join(folder, "lines"), Http(server.port)
            env = {"HOME": folder, "AGENT_CHAT_SERVER": server.url, "AGENT_NAME": "bell"}
            try:
                subprocess.run([*tmux, "new-session", "-d", "-x", "120", "-y", "30", "env",
                                *(f"{key}={value}" for key, value in env.items()),
                                sys.executable, __file__, "--agent", lines, server.url, folder],
                               check=True)
                wait_for(lambda: any(agent["status"] == "online" for agent in
                                     client.get("/api/agents")), 20)
                delays = [self.ring_once(client, lines, n) for n in range(self.plan.repeats)]
            finally:
                subprocess.run([*tmux, "kill-server"], check=False, stderr=subprocess.DEVNULL)
            result = milliseconds(delays)
            self.row("doorbell: send to submitted in the pane", f"p50 {result['p50']:.0f}, max "
                     f"{result['max']:.0f} ms", "p50 <= 400 ms", 400 / result["p50"], **result)

    def ring_once(self, client: Http, lines: str, number: int) -> float:
        time.sleep(0.3)  # the agent has read the last one and shows its prompt again
        started = time.monotonic()
        client.post("/api/send", **{"from": "alice", "to": "bell", "content": "ring"})
        wait_for(lambda: os.path.exists(lines) and len(read_lines(lines)) > number, 20)
        return float(read_lines(lines)[number]) - started


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise SystemExit("waited too long")
        time.sleep(0.01)


def read_lines(path: str) -> list[str]:
    with open(path) as file:
        return file.read().splitlines()


class Plugin:
    """`agent_chat.py mcp` as an agent's CLI launches it, with compiled bytecode."""

    def __init__(self, url: str, folder: str, name: str) -> None:
        env = {key: value for key, value in os.environ.items()
               if key != "PYTHONDONTWRITEBYTECODE" and not key.startswith("AGENT_")}
        env.update(HOME=folder, AGENT_CHAT_SERVER=url, AGENT_NAME=name,
                   PYTHONPYCACHEPREFIX=os.path.join(folder, "bytecode"))
        started = time.perf_counter()
        self.child = subprocess.Popen([sys.executable, PROGRAM, "mcp"], env=env, text=True,
                                      stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                      stderr=subprocess.DEVNULL, cwd=folder)
        self.call("initialize", {"protocolVersion": "2025-06-18", "capabilities": {},
                                 "clientInfo": {"name": "bench", "version": "1"}})
        self.initialized = time.perf_counter() - started
        self.write({"jsonrpc": "2.0", "method": "notifications/initialized"})

    def write(self, frame: dict[str, Any]) -> None:
        assert self.child.stdin
        self.child.stdin.write(json.dumps(frame) + "\n")
        self.child.stdin.flush()

    def call(self, method: str, params: dict[str, Any]) -> Any:
        assert self.child.stdout
        self.write({"jsonrpc": "2.0", "id": 1, "method": method, "params": params})
        for line in self.child.stdout:
            frame = json.loads(line)
            if frame.get("id") == 1 and "method" not in frame:
                return frame["result"]
        raise SystemExit("the plugin ended; is `mcp` installed for this Python?")

    def close(self) -> None:
        assert self.child.stdin
        self.child.stdin.close()
        self.child.wait(10)


def play_agent(lines: str, url: str, folder: str) -> None:
    """In the pane: an agent's CLI with a prompt, that reads its mail when the bell rings."""
    plugin = Plugin(url, folder, "bell")
    while True:
        line = input("❯ ")
        with open(lines, "a") as file:
            file.write(f"{time.monotonic()}\n")
        if "[agent-chat]" in line:
            plugin.call("tools/call", {"name": "check_messages",
                                       "arguments": {"mark_read": True}})


def fill(path: str, stored: int) -> None:
    """A database of that many messages in the hub's own schema, written by SQLite itself: 100
    agents, everything but each one's last 20 read; half of all mail is unread in a1's inbox."""
    spec = importlib.util.spec_from_file_location("agent_chat", PROGRAM)
    assert spec and spec.loader
    program = sys.modules["agent_chat"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    program.Store(path).close()
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA synchronous = OFF")
    indexes = connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'index' "
                                 "AND sql IS NOT NULL").fetchall()
    drops = "".join(f"DROP INDEX {name};" for name, _ in indexes)
    creates = "".join(f"{sql};" for _, sql in indexes)
    now = "strftime('%Y-%m-%dT%H:%M:%fZ', 'now')"
    connection.executescript(f"""
        BEGIN; {drops}
        WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {stored})
        INSERT INTO messages (seq, id, from_agent, to_agent, grp, content, in_reply_to,
            created_at, verified, thread, depth) SELECT i, printf('msg-%013d-%08x', i, i),
            'a' || (i * 7 % 100), CASE WHEN i % 50 = 0 THEN '' WHEN i % 2 THEN 'a1'
            ELSE 'a' || (i / 2 % 50 * 2) END, CASE WHEN i % 50 = 0 THEN 'g1' ELSE '' END,
            'about topic' || (i % 1000) || ' and ' || i || substr(hex(zeroblob(60)), 1, 100),
            '', {now}, 0, '', 0 FROM n;
        INSERT INTO inbox (seq, agent, read_at) SELECT seq, to_agent, CASE WHEN to_agent = 'a1'
            OR seq > {stored} - 2000 THEN NULL ELSE created_at END FROM messages
            WHERE to_agent != '' UNION ALL SELECT seq, 'a' || value, created_at FROM messages,
            json_each('[11,13,15,17,19,21,23,25,27,29]') WHERE grp = 'g1';
        {creates}
        INSERT INTO words (words) VALUES ('rebuild');
        INSERT OR REPLACE INTO facts VALUES ('indexed', {stored}), ('unseen', {stored}); COMMIT;
        PRAGMA wal_checkpoint(TRUNCATE)""")
    connection.close()


def ask_everything(server: Process, count: int) -> dict[str, Any]:
    """Milliseconds of each kind of request, one after the other."""
    client = Http(server.port)
    for number in range(100):
        client.post("/api/register", name=f"a{number}", groups=["g1"] if number % 2 else [])
    message = {"from": "a3", "to": "a5", "content": "hello topic7"}
    history = "/api/messages/history?limit=50&"
    figures: dict[str, Any] = {
        "unread 20": client.times(count, "/api/messages?agent=a6"),
        "of half a million": client.times(count, "/api/messages?agent=a1"),
        "history of agent": client.times(count, history + "agent=a6"),
        "history of pair": client.times(count, history + "agent=a3&with=a6"),
        "history of group": client.times(count, history + "group=g1"),
        "recent": client.times(count, "/api/messages/recent"),
        "search": client.times(count, "/api/messages/search?q=topic7"),
        "search common": client.times(count, "/api/messages/search?q=about"),
        "send": client.times(count, "/api/send", message),
        "send to half a million": client.times(count, "/api/send", message | {"to": "a1"})}
    child = os.fork()
    if not child:
        reader = Http(server.port)
        while os.getppid() != 1:
            reader.get("/api/messages?agent=a6")
    try:
        time.sleep(0.1)
        figures["send while polled"] = client.times(count, "/api/send", message)
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
    return figures | server.status()


def fan_out(client: Http, crowd: Crowd, rounds: int) -> dict[str, float]:
    """From POST to the last frame of one group message."""
    delays = []
    for number in range(rounds):
        tag = f"round-{number}- "
        started = time.perf_counter()
        client.send("/api/send", {"from": "alice", "group": "crowd", "content": tag + "z" * 130})
        delays.append(crowd.collect(tag.encode(), len(crowd.frames), 5)[-1] - started)
        client.receive()
        time.sleep(0.02)
    return milliseconds(delays)


# -- the longer modes


def scale(bench: Bench, huge: bool) -> None:
    """What grows with connected agents, with the size of a group, with stored messages."""
    for count in (10, 100, 1000, 5000):
        with scratch(bench.folder) as folder, hub(folder) as server:
            crowd, client = Crowd(server.port, count), Http(server.port)
            client.post("/api/register", name="alice")
            cpu = server.cpu()
            end = time.monotonic() + 5
            crowd.drain_until(lambda end=end: time.monotonic() > end)  # type: ignore[misc]
            idle = (server.cpu() - cpu) / 5
            run = wrk(folder, server.url + "/api/send", 64, 4, "send", "alice", "crowd0",
                      crowd=crowd)
            last = fan_out(client, crowd, 5)
            status = server.status()
            bench.row(f"{count:,} connected", f"send {run['rps']:,.0f}/s p99 {run['p99']:.1f} ms, "
                      f"group of all {last['p50']:.1f} ms, {status['rss']} MiB, "
                      f"{status['threads']} threads, idle {idle:.1%} CPU", "", 1,
                      idle=idle, last=last, **run, **status)
            crowd.close()
    for stored in (1000, 100_000, 1_000_000) + ((5_000_000,) if huge else ()):
        with scratch(bench.folder) as folder:
            started = time.perf_counter()
            fill(os.path.join(folder, "hub.db"), stored)
            built = time.perf_counter() - started
            with hub(folder) as server:
                start = time.perf_counter() - server.started
                figures = ask_everything(server, 300)
                run = wrk(folder, server.url + "/api/send", 64, 4, "send", "a3", "a5")
                size = os.path.getsize(os.path.join(folder, "hub.db")) / 2**20
        bench.row(f"{stored:,} stored", ", ".join(
            f"{key} {value['p50']:.2f}" for key, value in figures.items()
            if isinstance(value, dict)) + f" ms; send x 64 {run['rps']:,.0f}/s p99 "
            f"{run['p99']:.1f} ms, {figures['rss']} MiB, start {start * 1000:.0f} ms, file "
            f"{size:,.0f} MiB", "", 1, built=built, start=start, file_mib=size, load=run, **figures)


def soak(bench: Bench, minutes: float) -> None:
    """50 messages a second among 20 connected agents; memory, files and threads over time."""
    with scratch(bench.folder) as folder, hub(folder) as server:
        crowd, client = Crowd(server.port, 20), Http(server.port)
        samples: list[dict[str, float]] = []
        started = time.monotonic()
        chance, sent, pause = random.Random(1), 0, max(1.0, minutes)
        while (passed := time.monotonic() - started) < minutes * 60:
            names = [f"crowd{chance.randrange(20)}" for _ in range(2)]
            client.post("/api/send", **{"from": names[0], "to": names[1], "content": "s" * 140})
            mail = client.get(f"/api/messages?agent={names[1]}")
            client.post("/api/messages/read", agent_name=names[1],
                        message_ids=[message["id"] for message in mail])
            sent += 1
            if passed >= len(samples) * pause:
                wal = os.path.getsize(os.path.join(folder, "hub.db-wal")) / 2**20
                samples.append({"s": round(passed), "wal": round(wal, 2), **server.status()})
            due = started + sent / 50
            crowd.drain_until(lambda due=due: time.monotonic() > due)  # type: ignore[misc]
        settled = samples[len(samples) // 5:]  # the page cache fills first
        mean_s, mean_rss = (sum(sample[key] for sample in settled) / len(settled)
                            for key in ("s", "rss"))
        slope = (sum((sample["s"] - mean_s) * (sample["rss"] - mean_rss) for sample in settled)
                 / max(1, sum((sample["s"] - mean_s) ** 2 for sample in settled)) * 3600)
        first, last = settled[0], samples[-1]
        bench.row(f"soak, {sent:,} messages in {minutes:g} min", f"RSS {first['rss']} -> "
                  f"{last['rss']} MiB ({slope:+.2f} MiB/h)", "files, threads flat; WAL bounded",
                  float(last["fds"] <= first["fds"] and last["threads"] <= first["threads"]
                        and last["wal"] <= 16), samples=samples, slope_mib_per_hour=slope)
        print("\n".join(str(sample) for sample in samples[::max(1, len(samples) // 10)]))
        crowd.close()


def main() -> None:
    parts = [name[5:] for name in vars(Bench) if name.startswith("part_")]
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=parts, action="append")
    parser.add_argument("--scale", action="store_true")
    parser.add_argument("--huge", action="store_true", help="with --scale: also 5 M messages")
    parser.add_argument("--soak", type=float, metavar="MINUTES")
    parser.add_argument("--folder", help="where the databases go: this disk is measured")
    parser.add_argument("--program", help="another agent_chat.py")
    parser.add_argument("--echo", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--agent", nargs=3, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.echo:
        serve_echo(flags.echo[0], int(flags.echo[1]))
    if flags.agent:
        play_agent(*flags.agent)
    if not shutil.which("wrk"):
        raise SystemExit("bench.py drives its load with wrk: apt-get install wrk")
    global PROGRAM
    PROGRAM = os.path.abspath(flags.program or PROGRAM)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    pin(1)
    started = time.monotonic()
    with scratch(flags.folder) as folder:
        bench = Bench(QUICK if flags.quick else Plan(), folder)
        bench.measure_yardsticks()
        if flags.scale:
            scale(bench, flags.huge)
        if flags.soak:
            soak(bench, flags.soak)
        for name in flags.only or ([] if flags.scale or flags.soak else parts):
            getattr(bench, "part_" + name)()
    print(json.dumps({"seconds": round(time.monotonic() - started), "yardsticks": bench.yardsticks,
                      "calib_ms_end": round(calib(), 2), "missed": [
                          row.work for row in bench.rows if row.ratio < 1],
                      "rows": [row._asdict() for row in bench.rows]}))


if __name__ == "__main__":
    main()
