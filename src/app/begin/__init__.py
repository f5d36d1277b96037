"""What a run begins from: weights of others, what the data tell the model, what a class says."""
