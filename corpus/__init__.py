"""What prepare.py is made of: sources, documents, encoding, shard writing."""
