"""The zoo inside other toolboxes, and other people's networks on its attention."""
