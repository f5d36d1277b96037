"""What is drawn of a run and of a search."""
