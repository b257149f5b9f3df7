"""Using networks on files."""
