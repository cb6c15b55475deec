"""How long the page takes to its first answer beyond what importing torch and gradio alone costs, and its memory.

    python -m benchmarks.page_start                          # with the bundled model; --model MODEL with another

Wanted: 2 s, and 700 MB resident once the model has written. Both are the medians of --rounds fresh processes, taken in turn.
"""
import argparse
import contextlib
import http.client
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

from gradio_client import Client

ROOT = Path(__file__).parent.parent


def imports_s() -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch, gradio"], check=True, stderr=subprocess.DEVNULL)
    return time.perf_counter() - began


def page(model: str) -> tuple[float, float, float]:
    """(seconds to the first page, MB resident then, MB once the model has written 200 tokens)."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, ROOT / "app.py", "--model", model, "--port", str(port)],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not answers(port):
            if process.poll() is not None:
                sys.exit(f"app.py ended with {process.returncode}")
            time.sleep(0.02)
        first_s, first_mb = time.perf_counter() - began, resident_mb(process.pid)
        Client(f"http://127.0.0.1:{port}", verbose=False).submit("ROMEO:", length=200, api_name="/generate").result(timeout=300)
        return first_s, first_mb, resident_mb(process.pid)
    finally:
        process.terminate()
        process.wait()


def answers(port: int) -> bool:
    with contextlib.suppress(OSError, http.client.HTTPException):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("GET", "/")
        response = connection.getresponse()
        return response.status == 200 and b"</html>" in response.read()
    return False


def resident_mb(pid: int) -> float:
    """The most that the process has had resident until now, in MB of 10^6 bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    imports_s()  # the disk's cache
    rounds = [(imports_s(), *page(options.model)) for _ in range(options.rounds)]
    alone, first, first_mb, wrote_mb = map(statistics.median, zip(*rounds))
    print(f"import torch, gradio {alone:.2f} s; first page {first:.2f} s, {first - alone:.2f} s more")
    print(f"resident {first_mb:,.0f} MB with the first page, {wrote_mb:,.0f} MB at most once {options.model} has written")
