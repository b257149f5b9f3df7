"""Frames that give a network what timm and the tools ask of it."""
