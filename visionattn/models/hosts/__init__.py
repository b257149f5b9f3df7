"""Networks that take a guest attention."""
