"""What a user sees of a run when it starts."""
