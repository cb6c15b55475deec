"""Small helpers that the rest of the repository shares."""
