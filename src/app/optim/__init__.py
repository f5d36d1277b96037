"""Optimizer, parameter groups and schedule of a run, in place of the model's own."""

from app.optim.due import Due, Schedules, Watched, epochs_done
from app.optim.groups import Grouping, described, rate_of
from app.optim.matrices import TIMES
from app.optim.muon import Muon, MuonAdamW
from app.optim.optimizers import AdamW8bit, configure_optimizers, optimizer_of, with_rate
from app.optim.schedules import (
    OneCycle,
    Plateau,
    Steps,
    WarmupDecay,
    WarmupStableDecay,
    schedule_of,
)

__all__ = [
    "TIMES", "AdamW8bit", "Due", "Grouping", "Muon", "MuonAdamW", "OneCycle", "Plateau",
    "Schedules", "Steps", "WarmupDecay", "WarmupStableDecay", "Watched", "configure_optimizers",
    "described",
    "epochs_done", "optimizer_of", "rate_of", "schedule_of", "with_rate",
]  # fmt: skip
