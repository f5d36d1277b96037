"""What ranks share: the samples of a step, the gradients, the shards of the weights."""
