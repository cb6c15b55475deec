"""How long the page takes to its first response, and how much memory it uses.

    python -m benchmarks.page_start                   # the bundled model; --model MODEL for another

The time is what the page takes on top of importing torch and gradio (target: 2 s). The memory is
the peak once the model has generated text (target: 700 MB). Medians over --rounds fresh processes.
"""
import contextlib
import http.client
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import tyro
from gradio_client import Client

ROOT = Path(__file__).parents[1]


def main(model: str = "bundled", rounds: int = 3):
    time_imports()  # fills the disk cache
    results = [(time_imports(), *start_page(model)) for _ in range(rounds)]
    imports_s, first_s, first_mb, peak_mb = map(statistics.median, zip(*results))
    print(f"import torch, gradio: {imports_s:.2f} s; first page after {first_s:.2f} s, "
          f"{first_s - imports_s:.2f} s more")
    print(f"peak memory: {first_mb:,.0f} MB with the first page, {peak_mb:,.0f} MB once "
          f"{model} has generated text")


def time_imports() -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch, gradio"], check=True,
                   stderr=subprocess.DEVNULL)
    return time.perf_counter() - began


def start_page(model: str) -> tuple[float, float, float]:
    """(seconds to the first page, peak MB by then, peak MB after generating 200 tokens)."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    began = time.perf_counter()
    command = [sys.executable, ROOT / "app.py", "--model", model, "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        # wait for the first page
        while not responds(port):
            if process.poll() is not None:
                sys.exit(f"app.py ended with exit code {process.returncode}")
            time.sleep(0.02)
        first_s = time.perf_counter() - began
        first_mb = peak_resident_mb(process.pid)

        # generate a text
        client = Client(f"http://127.0.0.1:{port}", verbose=False)
        client.submit("ROMEO:", length=200, api_name="/generate").result(timeout=300)
        return first_s, first_mb, peak_resident_mb(process.pid)
    finally:
        process.terminate()
        process.wait()


def responds(port: int) -> bool:
    with contextlib.suppress(OSError, http.client.HTTPException):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("GET", "/")
        response = connection.getresponse()
        return response.status == 200 and b"</html>" in response.read()
    return False


def peak_resident_mb(pid: int) -> float:
    """The peak resident memory of a process so far, in MB of 10^6 bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    kilobytes = int(status.partition("VmHWM:")[2].split()[0])
    return kilobytes * 1024 / 1e6


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
