"""What serve.py is made of: bodies and errors, completions, conversations, metrics, the guard."""
