"""Other people's networks and toolboxes on the attention of this library."""
