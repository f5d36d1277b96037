"""Going on with a run: what is kept of the user's model and data beside the weights."""
