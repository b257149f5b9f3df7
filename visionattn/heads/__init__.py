"""Heads that stand on a backbone."""
