"""Runs that leave no trace, and what they are told of the data: on these the finders search."""
