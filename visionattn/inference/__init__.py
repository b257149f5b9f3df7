"""Running restoration networks on large images, and seeing what they look at."""

from visionattn.inference.memory import parse_bytes, run_within

__all__ = ["parse_bytes", "run_within"]
