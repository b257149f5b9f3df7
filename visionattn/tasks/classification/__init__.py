"""Naming what an image shows."""
