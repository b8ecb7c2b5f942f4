"""What the measurements of bench.py are made with: yardsticks, a hub of its own, cheap clients.

Everything is loopback, in a temporary folder, and ends with the bench. A child process plays
the bare echo servers (`load.py http PORT`, `load.py raw PORT`) and the agent in a tmux pane
(`load.py agent FILE URL FOLDER`).
"""

from __future__ import annotations

import contextlib
import http.server
import importlib.util
import json
import os
import select
import selectors
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

HERE = os.path.dirname(os.path.abspath(__file__))
PROGRAM = os.path.join(os.path.dirname(HERE), "agent_chat.py")
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


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def milliseconds(values: Sequence[float]) -> dict[str, float]:
    """Seconds in; n, p50, p99 and the largest in milliseconds out."""
    return {"n": len(values), "p50": round(percentile(values, 0.5) * 1000, 3),
            "p99": round(percentile(values, 0.99) * 1000, 3),
            "max": round(max(values) * 1000, 3)}


def busy_seconds() -> float:
    """Processor time of everybody on this machine so far."""
    with open("/proc/stat") as file:
        fields = [int(field) for field in file.readline().split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


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
                continue
            data = b""
            with contextlib.suppress(OSError):  # wrk resets what it has under way at its end
                if data := key.data.recv(1 << 16):
                    body = data[data.index(b"\r\n\r\n") + 4:]
                    key.data.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b"
                                  % (len(body), body))
            if not data:
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

    def written(self) -> int:
        """Bytes that it has given the kernel for files so far."""
        with open(f"/proc/{self.pid}/io") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["wchar"])

    def status(self, pid: int = 0) -> dict[str, float]:
        """RSS in MiB, threads and open files."""
        pid = pid or self.pid
        with open(f"/proc/{pid}/status") as file:
            lines = dict(line.split(":", 1) for line in file)
        return {"rss": round(int(lines["VmRSS"].split()[0]) / 1024, 1),
                "threads": int(lines["Threads"]), "fds": len(os.listdir(f"/proc/{pid}/fd"))}


def run_time(words: Sequence[str], env: dict[str, str] | None = None, folder: str = "/") -> float:
    """Seconds from exec to exit of a command that must succeed."""
    started = time.perf_counter()
    subprocess.run(words, env=env, cwd=folder, check=True, capture_output=True)
    return time.perf_counter() - started


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
            more = self.sock.recv(1 << 20)
            if not more:
                raise SystemExit("the hub closed the connection")
            data += more
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

    def __init__(self, port: int, agent: str, session: str) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), 30)
        self.sock.sendall(f"GET /ws?agent={agent} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: "
                          "websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
                          f"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nX-Agent-Session: "
                          f"{session}\r\n\r\n".encode())
        data = b""
        while b"\r\n\r\n" not in data:
            more = self.sock.recv(1 << 16)
            data += more or b" no answer\r\n\r\n"
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
            name = f"{group}{number}"
            answer = http_client.post("/api/register", name=name, groups=[group])
            frames = Frames(port, name, answer["session"])
            self.frames[frames.sock.fileno()] = frames
            self.poll.register(frames.sock, select.EPOLLIN)

    def collect(self, tag: bytes, expected: int, patience: float) -> list[float]:
        """When each of the expected frames came; fewer if nothing came for `patience` s."""
        came: list[float] = []
        last = time.perf_counter()
        while len(came) < expected and time.perf_counter() - last < patience:
            for number, _ in self.poll.poll(0.2):
                for text in self.frames[number].read():
                    if tag in text:
                        last = time.perf_counter()
                        came.append(last)
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
    # The number of agent aN is N + 1, that of group g1 101.
    connection.executescript(f"""
        BEGIN;
        WITH RECURSIVE n (i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < 99)
        INSERT INTO names SELECT i + 1, 'a' || i FROM n;
        INSERT INTO names VALUES (101, '#g1');
        WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {stored})
        INSERT INTO messages (seq, tag, created, sender, recipient, grp, recipients, verified,
            depth, content) SELECT i, i, strftime('%s', 'now') * 1000000, i * 7 % 100 + 1,
            CASE WHEN i % 50 = 0 THEN NULL WHEN i % 2 THEN 2 ELSE i / 2 % 50 * 2 + 1 END,
            iif(i % 50 = 0, 101, NULL),
            iif(i % 50 = 0, '[12,14,16,18,20,22,24,26,28,30]', NULL), 0, 0,
            'about topic' || (i % 1000) || ' and ' || i || substr(hex(zeroblob(60)), 1, 100)
            FROM n;
        INSERT INTO inbox (agent, state, seq, read)
            SELECT recipient, iif(unread, {program.RUNG}, {program.READ}), seq,
                iif(unread, NULL, 0)
            FROM (SELECT recipient, seq, recipient = 2 OR seq > {stored} - 2000 AS unread
                FROM messages WHERE recipient NOT NULL)
            UNION ALL SELECT value, {program.READ}, seq, 0 FROM messages, json_each(recipients)
                WHERE grp NOT NULL
            ORDER BY 1, 2, 3;
        {program.INDEX_ALL}
        INSERT OR REPLACE INTO facts VALUES ('unseen', {stored}); COMMIT;
        PRAGMA wal_checkpoint(TRUNCATE)""")
    connection.close()


def used(path: str) -> int:
    """Bytes of a database that are not free for its next rows."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        pages, free, size = (connection.execute(f"PRAGMA {name}").fetchone()[0]
                             for name in ("page_count", "freelist_count", "page_size"))
    return int((pages - free) * size)


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


if __name__ == "__main__":
    if sys.argv[1] == "agent":
        play_agent(*sys.argv[2:])
    serve_echo(sys.argv[1], int(sys.argv[2]))
