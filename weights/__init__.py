"""Other people's weight layouts."""
