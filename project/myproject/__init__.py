"""A model and its data."""
