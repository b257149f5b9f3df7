"""Recurrent attention on maps: states that decay, are written and read on the way from pixel to pixel."""
