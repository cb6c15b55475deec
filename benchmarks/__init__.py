"""Benchmarks of speed and quality; README.md lists them.

    python -m benchmarks.decode     # one of them
    python -m benchmarks.run        # all of them

They share rounds.py (timing), ratio.py (comparisons) and pages.py (results in Markdown).
"""
