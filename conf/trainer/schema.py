"""How long a run trains, where, and what it checks on the way: Lightning's Trainer."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

from omegaconf import MISSING

from ..rules import MANY, TEN_YEARS_MIN, count, number, require

MOST_DEVICES = 1024
LIMITS = ("limit_train", "limit_val", "limit_test", "limit_predict", "overfit")
NO_LIMIT = "for no limit type {key}=null"
NO_BOUND = "for no bound type {key}=null"

Accelerator = StrEnum("Accelerator", "auto cpu gpu mps tpu")
"""Where the tensors live; auto takes a GPU where there is one."""

Profiler = StrEnum("Profiler", "simple advanced pytorch")
"""Seconds of each hook; of each function; of each operation, with a trace."""


@dataclass(kw_only=True)
class Trainer:
    """Limits, device and intervals of one run."""

    _instead_: ClassVar[dict[str, str]] = {
        "accumulate_grad_batches": "type accumulate=constant accumulate.factor=4",
        "barebones": "type logger=none callbacks=none",
        "callbacks": "choose callbacks=early_stopping, or type "
        "+callbacks.mine._target_=package.Callback",
        "default_root_dir": "type name=mine, or hydra.run.dir=PATH",
        "enable_checkpointing": "to write none type callbacks.checkpoint=null",
        "enable_model_summary": "type callbacks=summary",
        "enable_progress_bar": "to draw none type callbacks.progress=null",
        "fast_dev_run": "type debug=fast",
        "gradient_clip_algorithm": "type clip=norm or clip=value",
        "gradient_clip_val": "type clip=norm clip.max_norm=1.0",
        "logger": "choose logger=csv, or type +logger.mine._target_=package.Logger",
        "max_time": "type trainer.max_minutes=60",
        "model_registry": "type name=mine, in whose folder the checkpoints are",
        "precision": "type precision=bf16",
        "strategy": "type strategy=ddp",
        "use_distributed_sampler": "leave it out: strategy=ddp splits the data, also without it",
    }
    """Arguments of Lightning's that something else here replaces, and what to type."""

    _target_: str = "app.run.trainer.Trainer"
    max_epochs: int | None = number(above=0, at_most=MANY, instead=NO_LIMIT)
    """Epochs, >= 1; null = no limit."""
    max_steps: int | None = number(above=0, at_most=MANY, instead=NO_LIMIT)
    """Optimizer steps, >= 1; null = no limit."""
    min_epochs: int | None = number(above=0, at_most=MANY, instead=NO_BOUND)
    """Epochs before which nothing ends the run early, >= 1; null = none."""
    min_steps: int | None = number(above=0, at_most=MANY, instead=NO_BOUND)
    """Likewise optimizer steps."""
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
    deterministic: bool | str = MISSING
    """Refuse operations without a deterministic implementation; warn = warn of them."""
    benchmark: bool | None = MISSING
    """Let cuDNN time its algorithms; null = Lightning's choice."""
    limit_train_batches: int | float | None = MISSING
    """Micro-batches (int) or share (float, 0 to 1) of each training epoch; null = all."""
    limit_val_batches: int | float | None = MISSING
    """Likewise of each validation; 0 switches validation off."""
    limit_test_batches: int | float | None = MISSING
    """Likewise of the test."""
    limit_predict_batches: int | float | None = MISSING
    """Likewise of `app.evaluate stage=predict`."""
    overfit_batches: int | float | None = MISSING
    """Train on these first micro-batches (int), or this share of them (float), in every epoch, not
    shuffled, and validate on as many, or limit_val_batches; null = on all. For finding faults."""
    val_check_interval: int | float = MISSING
    """Validate after this many micro-batches (int) or this share of an epoch (float)."""
    check_val_every_n_epoch: int | None = count(
        instead="to switch validation off type trainer.limit_val_batches=0"
    )
    """Validate in every n-th epoch; null counts val_check_interval across epochs."""
    num_sanity_val_steps: int = count(at_least=-1, instead="to skip the sanity check type {key}=0")
    """Validation batches run before training to find errors early, >= 0; -1 = all."""
    log_every_n_steps: int = count(instead="to switch logging off use logger=none")
    """Log the means of the last n optimizer steps, >= 1."""
    detect_anomaly: bool = MISSING
    """Find the operation that made a NaN gradient (slow)."""
    inference_mode: bool = MISSING
    """Evaluate under `torch.inference_mode`; false = under `no_grad`, where a model needs it."""
    reload_dataloaders_every_n_epochs: int = count(
        at_least=0,
        at_most=1,
        instead="what is made less often cannot be made again in a continued run; type {key}=1, "
        "and keep in the model or the data what is to stay",
    )
    """1 = ask for the loaders anew in each epoch; 0 = once."""
    profiler: Profiler | None = MISSING
    """simple, advanced or pytorch: where the time goes, in files of the run's folder; null = no."""
    plugins: dict[str, Any] = MISSING
    """Lightning's plugins by name: +trainer.plugins.mine._target_=package.Plugin, a LayerSync, or a
    Precision with precision=fp32."""
    enable_autolog_hparams: bool = MISSING
    """Give the hyper-parameters that a model saves to the loggers."""

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
        for key in ("epochs", "steps"):
            least, most = getattr(self, f"min_{key}"), getattr(self, f"max_{key}")
            require(
                None in (least, most) or least <= most,
                f"trainer.min_{key} must be <= trainer.max_{key}, {most}, got {least}; type "
                f"trainer.min_{key}=null",
            )
        require(
            self.deterministic in (True, False, "warn"),
            f"trainer.deterministic must be true, false or warn, got {self.deterministic}; type "
            "trainer.deterministic=true",
        )
        require(
            self.overfit_batches is None or self.overfit_batches > 0,
            "trainer.overfit_batches must leave a batch to train on, got "
            f"{self.overfit_batches}; to train on all type trainer.overfit_batches=null",
        )
        require(
            None in (self.overfit_batches, self.limit_train_batches),
            f"trainer.limit_train_batches={self.limit_train_batches} has no effect: "
            "trainer.overfit_batches is the limit; type trainer.limit_train_batches=null",
        )
        for name, plugin in self.plugins.items():
            require(
                isinstance(plugin, dict) and "_target_" in plugin,
                f"trainer.plugins.{name} needs a class; type "
                f"+trainer.plugins.{name}._target_=package.Plugin",
            )
        for key in (f"{name}_batches" for name in LIMITS):
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
