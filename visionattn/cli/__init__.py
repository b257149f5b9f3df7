"""The command lines: arguments, and one call each."""
