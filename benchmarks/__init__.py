"""What the networks of the zoo are, and how fast they run."""
