"""What a model has measured so far in an epoch: its metrics, and the means of what it logs."""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection


class Unfinished:
    """The unfinished measurements of a training epoch, kept in checkpoints and gone on from.

    Lightning keeps neither: the mean over an epoch that was continued would be one over its rest.
    What a model logs as a number is known again when it logs it the first time after a restore;
    until then the saved sums wait.
    """

    def __init__(self) -> None:
        self.waiting: dict[str, dict[str, Tensor]] = {}
        """Sums by what Lightning calls them, that are not yet part of its own."""

    def state(self, trainer: pl.Trainer, model: pl.LightningModule) -> dict[str, Any]:
        """In plain values, of this rank; asked for between two batches, or at an epoch's end."""
        self.go_on(trainer)
        epoch_ends = trainer.is_last_batch
        results = dict(_logged(trainer))
        # Lightning resets those which it was given, at the start of the next epoch
        given = {id(one.value) for one in results.values() if not one.is_tensor}
        for part in model.modules():
            if isinstance(part, MetricCollection):
                list(part.items())  # lets metrics that share a state have copies of it
        metrics = {
            name: {"count": metric.update_count, "state": _copied(metric.metric_state)}
            for name, metric in _metrics(model).items()
            if metric.update_called and not (epoch_ends and id(metric) in given)
        }
        sums = {} if epoch_ends else self.waiting | {
            key: _copied({name: getattr(one, name) for name in _parts(one)})
            for key, one in results.items()
            if one.is_tensor and one.meta.on_epoch and not one.has_reset
        }  # fmt: skip
        return {"metrics": metrics, "sums": sums, "line": _line_due(trainer, results)}

    def restore(
        self, trainer: pl.Trainer, model: pl.LightningModule, state: Mapping[str, Any]
    ) -> None:
        """Go on from what `state` returned, before the first batch."""
        known = _metrics(model)
        for name in state["metrics"].keys() & known.keys():
            metric, saved = known[name], state["metrics"][name]
            for key, value in _copied(saved["state"], metric.device).items():
                setattr(metric, key, value)
            metric._update_count = saved["count"]
        self.waiting = _copied(state["sums"], model.device)
        if state["line"]:  # Lightning hands it to the loggers behind the hooks of its batch
            step, line = state["line"]
            for logger in trainer.loggers:
                logger.log_metrics(line, step=step)
                logger.save()

    def go_on(self, trainer: pl.Trainer) -> None:
        """Add the saved sums to those that Lightning has begun since."""
        results = _logged(trainer) if self.waiting else {}
        for key in self.waiting.keys() & results.keys():
            one, saved = results[key], self.waiting.pop(key)
            one.value = _joined(one.meta, one.value, saved["value"])
            if one.meta.is_mean_reduction:
                one.cumulated_batch_size = one.cumulated_batch_size + saved["cumulated_batch_size"]
            one._computed = None


def _logged(trainer: pl.Trainer) -> Mapping[str, Any]:
    return trainer.fit_loop.epoch_loop._results


def _metrics(model: pl.LightningModule) -> dict[str, Metric]:
    return {name: part for name, part in model.named_modules() if isinstance(part, Metric)}


def _parts(one: Any) -> tuple[str, ...]:
    return ("value", "cumulated_batch_size") if one.meta.is_mean_reduction else ("value",)


def _joined(meta: Any, now: Tensor, before: Tensor) -> Tensor:
    if meta.is_max_reduction or meta.is_min_reduction:
        joined: Tensor = meta.reduce_fx(now, before)
        return joined
    return now + before


def _copied(value: Any, device: torch.device | None = None) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, Mapping):
        return {key: _copied(item, device) for key, item in value.items()}
    return [_copied(item, device) for item in value] if isinstance(value, list) else value


def _line_due(trainer: pl.Trainer, results: Mapping[str, Any]) -> list[Any]:
    """Optimizer step and values of what Lightning logs when the hooks of this batch are over."""
    step = trainer.fit_loop.epoch_loop._batches_that_stepped
    is_due = (step + 1) % trainer.log_every_n_steps == 0 or trainer.should_stop  # type: ignore[attr-defined]
    if trainer.is_last_batch or not is_due or not results:
        return []
    found = trainer.fit_loop.epoch_loop._results.metrics(on_step=True)["log"]
    line = {name: float(value) for name, value in found.items()}
    return [step, line | {"epoch": trainer.current_epoch}] if line else []
