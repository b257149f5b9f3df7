"""Layers whose state runs through the map, pixel by pixel."""
