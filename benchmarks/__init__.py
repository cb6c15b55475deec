"""Speed and quality, measured against peers: run one with `python -m benchmarks.decode`, all with `python -m benchmarks.run`."""
