"""Where a run trains: which processes there are, and how those of this machine are started."""

SINGLE = "app.strategy.single"
DDP = "app.strategy.ddp"
"""The strategies, by `_target_`, in which a rank holds a whole model."""


def is_slurm(launch: object) -> bool:
    """Whether what `launch` says is that SLURM starts the run: the preset or its schema."""
    return hasattr(launch, "max_requeues")
