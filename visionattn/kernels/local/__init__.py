"""Every fixed 2-D pattern: windows, shifted windows, overlapping windows."""
