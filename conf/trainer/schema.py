"""How long a run trains, where, and what it checks on the way: Lightning's Trainer."""

from dataclasses import dataclass
from enum import StrEnum

from omegaconf import MISSING

from ..rules import MANY, TEN_YEARS_MIN, count, number, require

MOST_DEVICES = 1024
NO_LIMIT = "for no limit type {key}=null"

Accelerator = StrEnum("Accelerator", "auto cpu gpu mps tpu")
"""Where the tensors live; auto takes a GPU where there is one."""


@dataclass(kw_only=True)
class Trainer:
    """Limits, device and intervals of one run."""

    _target_: str = "app.run.trainer.Trainer"
    max_epochs: int | None = number(above=0, at_most=MANY, instead=NO_LIMIT)
    """Epochs, >= 1; null = no limit."""
    max_steps: int | None = number(above=0, at_most=MANY, instead=NO_LIMIT)
    """Optimizer steps, >= 1; null = no limit."""
    max_minutes: float | None = number(above=0, at_most=TEN_YEARS_MIN, instead=NO_LIMIT)
    """Wall time in minutes, > 0; null = no limit."""
    accelerator: Accelerator = MISSING
    """auto, cpu, gpu, mps or tpu."""
    devices: int | str = MISSING
    """Devices of each machine, one process on each, >= 1; auto = one for strategy=single, else all
    GPUs there are."""
    num_nodes: int = count(at_most=100_000, instead="type {key}=1")
    """Machines, >= 1; more than one where torchrun or srun starts the processes."""
    sync_batchnorm: bool = MISSING
    """BatchNorm over the batches of all ranks; GPUs only."""
    threads: int | None = number(above=0, at_most=1024, instead=NO_LIMIT)
    """Intra-op CPU threads, >= 1; null = torch's own choice. One is fastest for tiny models."""
    deterministic: bool = MISSING
    """Refuse operations without a deterministic implementation."""
    benchmark: bool | None = MISSING
    """Let cuDNN time its algorithms; null = Lightning's choice."""
    limit_train_batches: int | float | None = MISSING
    """Micro-batches (int) or share (float, 0 to 1) of each training epoch; null = all."""
    limit_val_batches: int | float | None = MISSING
    """Likewise of each validation; 0 switches validation off."""
    limit_test_batches: int | float | None = MISSING
    """Likewise of the test."""
    val_check_interval: int | float = MISSING
    """Validate after this many micro-batches (int) or this share of an epoch (float)."""
    check_val_every_n_epoch: int | None = count(
        instead="to switch validation off type trainer.limit_val_batches=0"
    )
    """Validate in every n-th epoch; null counts val_check_interval across epochs."""
    num_sanity_val_steps: int = count(at_least=0, instead="to skip the sanity check type {key}=0")
    """Validation batches run before training to find errors early, >= 0."""
    log_every_n_steps: int = count(instead="to switch logging off use logger=none")
    """Log the means of the last n optimizer steps, >= 1."""
    detect_anomaly: bool = MISSING
    """Find the operation that made a NaN gradient (slow)."""

    def __post_init__(self) -> None:
        require(
            any(limit is not None for limit in (self.max_epochs, self.max_steps, self.max_minutes)),
            "trainer.max_epochs, max_steps or max_minutes must be given, got null for all three; "
            "type trainer.max_epochs=30",
        )
        require(
            self.devices == "auto"
            or (isinstance(self.devices, int) and 1 <= self.devices <= MOST_DEVICES),
            f"trainer.devices must be >= 1, up to {MOST_DEVICES}, or auto, got {self.devices}; "
            "type trainer.devices=2 strategy=ddp",
        )
        require(
            self.limit_train_batches is None or self.limit_train_batches > 0,
            "trainer.limit_train_batches must leave a batch to train on, got "
            f"{self.limit_train_batches}; for all batches type trainer.limit_train_batches=null",
        )
        for key in ("limit_train_batches", "limit_val_batches", "limit_test_batches"):
            value = getattr(self, key)
            require(
                value is None or 0 <= value <= (MANY if isinstance(value, int) else 1),
                f"trainer.{key} must be a count >= 0 or a share from 0.0 to 1.0, got {value}; for "
                f"all batches type trainer.{key}=null",
            )
        interval = self.val_check_interval
        require(
            1 <= interval <= MANY if isinstance(interval, int) else 0 < interval <= 1,
            "trainer.val_check_interval must be a count >= 1 or a share up to 1.0, got "
            f"{interval}; to validate once an epoch type trainer.val_check_interval=1.0",
        )
        require(
            self.check_val_every_n_epoch is not None or isinstance(interval, int),
            "trainer.val_check_interval must be a count of micro-batches where "
            f"trainer.check_val_every_n_epoch is null, got {interval}; type "
            "trainer.val_check_interval=100, or trainer.check_val_every_n_epoch=1",
        )


PRESETS = {"default": Trainer}
