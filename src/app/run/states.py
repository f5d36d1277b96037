"""What a run can come to, and where that stands. Needs no torch."""

ENDED = ("finished", "pruned")
"""What `status` in result.json says of a run that nothing is left to do for."""

UNREADABLE = "unreadable"
"""Of a run whose result.json is torn."""

SLURM_JOB = "slurm_job"
"""The key of result.json that names the job of SLURM which trains the run."""
