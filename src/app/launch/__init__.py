"""Where a run trains: which processes there are, and how those of this machine are started."""

SINGLE = "app.strategy.single"
DDP = "app.strategy.ddp"
"""The strategies, by `_target_`, in which a rank holds a whole model."""
