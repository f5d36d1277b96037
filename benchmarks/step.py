"""What logging, EMA and clipping add to the step of a bare Lightning `Trainer`.

Ours: `StepMetrics` with `MetricsCsv`, `Ema`, `NormClip`. Target: the three together add at most
15 %, that is 1.15 times the bare step (no logger, checkpoints or progress bar). Beside them
Lightning's own: `self.log` in the training step with CSVLogger, EMAWeightAveraging,
`gradient_clip_val`; and, without a target, all that `app.train` has in a step, and a loop without a
trainer. A small MLP, batch 64, fused AdamW.

A cost is the CPU time of the steps behind the first hundred of a fit of its own, read where the
loader serves them. Run as `python benchmarks/step.py`.
"""

import logging
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from presets import built, checked
from side_by_side import Contestant, in_turns, show, sized
from torch import Tensor

from app.models.mlp import Mlp
from app.record.loggers import MetricsCsv
from app.record.metrics import StepMetrics
from app.resume.exact import ExactResume
from app.resume.position import ResumableLoader
from app.run.build import build_callbacks, build_trainer
from app.run.trainer import Trainer

ROUNDS = 21
WARM_UP, STEPS = sized((100, 500), (1, 2))
BATCH = 64
BARE, THREE = "Lightning, bare", "ours: log, EMA and clip"
TARGETS = {THREE: 1.15}


class Batches:
    """Serves batches made before; notes the CPU seconds of the steps behind the warm-up."""

    def __init__(self) -> None:
        self.batches = [(torch.randn(BATCH, 40), torch.randint(10, (BATCH,))) for _ in range(50)]
        self.spent = 0.0

    def __len__(self) -> int:
        return WARM_UP + STEPS + 1  # who knows the length does not ask behind the last

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        start = 0.0
        for number in range(len(self)):
            if number == WARM_UP:
                start = time.process_time()
            if number == WARM_UP + STEPS:
                self.spent = time.process_time() - start
            yield self.batches[number % len(self.batches)]


class Model(Mlp):
    """A small MLP; `logs` says whether each training step logs its loss."""

    def __init__(self, *, logs: bool) -> None:
        super().__init__(in_features=40, num_classes=10, hidden_sizes=[100, 100])
        self.logs = logs

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        if self.logs:
            self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4, fused=True)


def bare(folder: str, **arguments: Any) -> pl.Trainer:
    """Lightning's trainer with nothing beside the training."""
    nothing = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    where = {"accelerator": "cpu", "max_epochs": 1, "default_root_dir": folder}
    return pl.Trainer(**{**where, **nothing, **arguments})


def ours(folder: str, callbacks: list[pl.Callback], *, logs: bool = False) -> Trainer:
    """The trainer of a run."""
    loggers = [MetricsCsv(save_dir=folder)] if logs else []
    one_epoch = checked("trainer.max_epochs=1", run_dir=folder)
    return build_trainer(one_epoch, callbacks=callbacks, loggers=loggers)


def fit(make: Callable[[str], pl.Trainer], *, logs: bool = False, resumes: bool = False) -> float:
    """CPU seconds of the steps of one fit with the trainer that `make` returns, given a folder."""
    pl.seed_everything(0, verbose=False)
    batches = Batches()
    with TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        trainer = make(folder)
        trainer.fit(
            Model(logs=logs), ResumableLoader(batches, asks_ahead=False) if resumes else batches
        )
    return batches.spent


def loop() -> float:
    """CPU seconds of the same steps without a trainer."""
    pl.seed_everything(0, verbose=False)
    batches, model = Batches(), Model(logs=False)
    optimizer = model.configure_optimizers()
    for number, batch in enumerate(batches):
        optimizer.zero_grad()
        model.training_step(batch, number).backward()
        optimizer.step()
    return batches.spent


def contestants() -> dict[str, Contestant]:
    """A fit each, from the bare one on."""

    def ema() -> pl.Callback:
        return built("averaging", "averaging=ema")

    def clip() -> pl.Callback:
        return built("clip", "clip=norm")

    def three() -> list[pl.Callback]:
        return [clip(), ema(), StepMetrics()]

    def all_of_a_run(folder: str) -> Trainer:
        beside = build_callbacks(checked(run_dir=folder).plain["callbacks"])
        return ours(folder, [*three(), ExactResume(), *beside], logs=True)

    def all_of_lightning(folder: str) -> pl.Trainer:
        averaging, logger = EMAWeightAveraging(), CSVLogger(folder)
        return bare(folder, callbacks=[averaging], logger=logger, gradient_clip_val=1.0)

    return {
        BARE: partial(fit, bare),
        "ours: log": partial(fit, lambda folder: ours(folder, [StepMetrics()], logs=True)),
        "ours: EMA": partial(fit, lambda folder: ours(folder, [ema()])),
        "ours: clip": partial(fit, lambda folder: ours(folder, [clip()])),
        THREE: partial(fit, lambda folder: ours(folder, three(), logs=True)),
        "ours: these, resume, checkpoints, progress": partial(fit, all_of_a_run, resumes=True),
        "Lightning's: log": partial(
            fit, lambda folder: bare(folder, logger=CSVLogger(folder)), logs=True
        ),
        "Lightning's: EMA": partial(
            fit, lambda folder: bare(folder, callbacks=[EMAWeightAveraging()])
        ),
        "Lightning's: clip": partial(fit, lambda folder: bare(folder, gradient_clip_val=1.0)),
        "Lightning's: log, EMA and clip": partial(fit, all_of_lightning, logs=True),
        "a loop without a trainer": loop,
    }


def main() -> None:
    """Measure them all in turns."""
    warnings.filterwarnings("ignore")  # Lightning's, of loaders and validation
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    costs = in_turns(contestants(), rounds=ROUNDS)
    show("a training step", costs, base=BARE, targets=TARGETS)


if __name__ == "__main__":
    main()
