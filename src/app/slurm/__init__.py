"""One run as a job of SLURM: handing it in, what its tasks do, and what SLURM says of it."""
