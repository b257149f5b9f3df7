"""Degradations: from a true image to the input of a network that restores it."""
