"""A run that is asked to stop saves between two optimizer steps, leaves, and goes on as if it had
not been asked: no step is made twice, no validation is left out."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from test_resume import CASES, CHOSEN

from app.process.asked import asked
from app.run.build import Run, build
from app.run.checkpoint import newest_intact
from app.stop.signals import StopsOnSignal

VALIDATED = ("trainer.limit_val_batches=3", "data.eval_batch_size=8")
HOOKS = ("on_train_batch_start", "on_validation_batch_start", "on_validation_end",
         "on_save_checkpoint")  # fmt: skip


class SignalsItself(pl.Callback):
    """Sends this process signals the n-th time that a hook is called; notes the steps of a fit."""

    def __init__(self, number: int) -> None:
        self.steps: list[int] = []
        self._count = 0
        self._number = number

    def signal(self, *args: Any) -> None:
        self._count += 1
        if self._count == self._number:
            for name in (signal.SIGUSR2, signal.SIGTERM):  # a time-out: first a warning, then this
                os.kill(os.getpid(), name)

    def on_before_optimizer_step(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step not in self.steps:  # two optimizers that step on a batch
            self.steps.append(trainer.global_step)


def fit(
    config: dict[str, Any], *, hook: str = "on_fit_end", number: int = 0
) -> tuple[Run, list[int], Any]:
    """Fit, from the last checkpoint; also the steps made, and the exit code where it was left."""
    sender = type("At", (SignalsItself,), {hook: SignalsItself.signal})(number)
    exit_code: Any = None
    with asked.listening():
        run = build(config, [sender, StopsOnSignal()])
        checkpoint = newest_intact(Path(config.run_dir) / "checkpoints")
        try:
            run.trainer.fit(run.model, datamodule=run.data, ckpt_path=checkpoint)
        except SystemExit as stop:
            exit_code = stop.code
    return run, sender.steps, exit_code


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("case", CHOSEN)
def test_a_run_asked_to_stop_at_any_moment_equals_the_undisturbed_one(
    checked: Callable[..., Any], tmp_path: Path, case: str, hook: str
) -> None:
    overrides = [word for word in CASES[case] if "every_n_steps" not in word]
    if "theirs" not in case:
        overrides += VALIDATED
    whole, whole_steps, _ = fit(checked(*overrides, f"run_dir={tmp_path}/whole"))
    config = checked(*overrides, f"run_dir={tmp_path}/asked")
    first, second = (fit(config, hook=hook, number=number) for number in (1, 2))
    last, steps, _ = fit(config)
    assert first[2] == 128 + signal.SIGUSR2  # the first of the two
    assert first[1] + second[1] + steps == whole_steps  # each once
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, last.model.state_dict()[name]), name
    metrics = [(tmp_path / name / "metrics.csv").read_text() for name in ("whole", "asked")]
    assert metrics[0] == metrics[1]
