"""The one training loop, its configuration and its run folders; it knows tasks only by their interface."""
