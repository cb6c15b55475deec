"""Mixed clients on a server: memory, threads and files stay flat, and texts stay what they are."""
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from conftest import ROOT, free_port
from faults import Soak

pytestmark = pytest.mark.soak

CLIENTS = 12
PROMPTS = ("The king", "O Romeo", "What is", "\n\n", "A" * 100)
MODEL = b'{"model": "bundled:shakespeare", '
MALFORMED = (b"", b"{", b"[" * 50_000, b"\xff\xfe", b'{"prompt": "x"}', MODEL + b'"prompt": {}}',
             MODEL + b'"prompt": "\\ud800", "echo": true}',
             MODEL + b'"prompt": "x", "n": 100000}', MODEL + b'"prompt": "x", "max_tokens": -1}',
             MODEL + b'"prompt": "x", "stop": ["' + b"y" * 100_000 + b'"]}')


@pytest.fixture
def server():
    """(address, process) of serve.py with a bundled model."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, ROOT / "serve.py", "-m", "bundled:shakespeare", "--port", str(port)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
        stderr=open("server.txt", "w"))
    for _ in range(600):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            break
        except OSError:
            assert process.poll() is None, Path("server.txt").read_text()
            time.sleep(0.1)
    yield ("127.0.0.1", port), process
    process.terminate()
    process.wait(timeout=30)


def test_mixed_clients_leave_the_server_as_it_was(server):
    address, process = server
    expected = {}  # (prompt, seed) -> the text of the request on its own
    for prompt in PROMPTS:
        for seed in range(3):
            status, expected[prompt, seed] = complete(address, prompt, seed)
            assert status == 200, expected
    with Soak() as soak:
        lock = threading.Lock()
        errors = []

        def count(fault, outcome):
            with lock:
                soak.count(fault, outcome)

        def client():
            try:
                while time.monotonic() < soak.ends and not errors:
                    visit(address, expected, soak.random, count)
            except BaseException as error:
                errors.append(error)

        # measure after a first wave, when everything is warm
        warm_up = time.monotonic() + min(20, (soak.ends - time.monotonic()) / 4)
        threads = [threading.Thread(target=client) for _ in range(CLIENTS)]
        for thread in threads:
            thread.start()
        time.sleep(max(0, warm_up - time.monotonic()))
        before = resources(process.pid)
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

        # wait for the last requests that were cancelled, then compare
        for _ in range(200):
            after = resources(process.pid)
            if after["files"] <= before["files"] and after["threads"] <= before["threads"]:
                break
            time.sleep(0.1)
        assert after["files"] <= before["files"] + 2
        assert after["threads"] <= before["threads"] + 2
        assert after["MB"] <= 1.1 * before["MB"] + 20
        assert complete(address, PROMPTS[0], 0)[1] == expected[PROMPTS[0], 0]
        assert "Traceback" not in Path("server.txt").read_text()
        soak.count("a session of mixed clients",
                   f"{before['MB']} MB before, {after['MB']} MB after; threads and files flat")


def visit(address, expected, random, count):
    """One request: 30% are cancelled, 10% malformed, 10% read slowly; the others are compared."""
    draw = random.random()
    prompt, seed = random.choice(list(expected))
    if draw < 0.1:
        status, _ = post(address, random.choice(MALFORMED))
        assert 400 <= status < 500, status
        count("a malformed request", "refused with an error of 4xx")
    elif draw < 0.4:
        # leave after a few bytes, or at once
        connection = open_stream(address, body(prompt, seed, stream=True, max_tokens=400))
        connection.settimeout(20)
        if random.random() < 0.7:
            connection.recv(random.choice((1, 100, 1000)))
        connection.close()
        count("a client that leaves", "its place is free again")
    elif draw < 0.5:
        connection = open_stream(address, body(prompt, seed, stream=True))
        connection.settimeout(60)
        received = b""
        while b"[DONE]" not in received and (piece := connection.recv(64)):
            received += piece
            time.sleep(0.005)
        connection.close()
        if b" 200 " in received[:20]:
            assert streamed_text(received) == expected[prompt, seed]
        count("a slow reader", "the text of the request on its own")
    else:
        status, text = complete(address, prompt, seed)
        assert status in (200, 429, 503), (status, text)
        if status == 200:
            assert text == expected[prompt, seed]
        count("a whole answer among others", "its text on its own" if status == 200 else "429")


def body(prompt: str, seed: int, **options) -> bytes:
    return json.dumps({"model": "bundled:shakespeare", "prompt": prompt, "seed": seed,
                       "max_tokens": 40, **options}).encode()


def complete(address, prompt: str, seed: int) -> tuple[int, str]:
    status, answer = post(address, body(prompt, seed))
    return status, json.loads(answer)["choices"][0]["text"] if status == 200 else answer


def post(address, content: bytes) -> tuple[int, bytes]:
    request = urllib.request.Request(
        "http://{}:{}/v1/completions".format(*address), content,
        {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def open_stream(address, content: bytes) -> socket.socket:
    connection = socket.create_connection(address)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.sendall(b"POST /v1/completions HTTP/1.0\r\nHost: 127.0.0.1\r\n"
                       b"Content-Type: application/json\r\n"
                       b"Content-Length: %d\r\n\r\n" % len(content) + content)
    return connection


def streamed_text(received: bytes) -> str:
    events = received.partition(b"\r\n\r\n")[2].decode().split("\n\n")
    payloads = [event.removeprefix("data: ") for event in events if event.startswith("data: {")]
    return "".join(choice["text"] for payload in payloads
                   for choice in json.loads(payload)["choices"])


def resources(pid: int) -> dict[str, int]:
    """The process's open files, threads and resident memory in MB."""
    status = Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return {"files": len(list(Path(f"/proc/{pid}/fd").iterdir())),
            "threads": int(fields["Threads"]), "MB": int(fields["VmRSS"].split()[0]) // 1024}
