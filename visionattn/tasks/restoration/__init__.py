"""Restoring images."""
