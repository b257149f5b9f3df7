"""Modules that several families share or that plug into other networks."""
