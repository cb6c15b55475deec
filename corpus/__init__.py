"""The parts of prepare.py: sources, reading documents, encoding, writing shards."""
