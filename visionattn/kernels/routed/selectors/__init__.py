"""Ways to list the regions that a region attends to."""
