"""Variants of networks as data, and the names of their parameters."""
