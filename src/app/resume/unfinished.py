"""What a model has measured so far in an epoch: its metrics, and the means of what it logs."""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from app.parallel.data_parallel import metrics_in

REDUCED = {"mean": torch.mean, "sum": torch.sum, "min": torch.min, "max": torch.max}
SETTINGS = ("prog_bar", "logger", "on_step", "on_epoch", "add_dataloader_idx", "metric_attribute")


class Unfinished:
    """The unfinished measurements of a training epoch, kept in checkpoints and gone on from.

    Lightning keeps none: the mean over an epoch that was continued would be one over its rest. What
    a model logs is known to Lightning again when the model logs it the first time after a restore,
    or else at the end of the epoch; until then it waits here.
    """

    def __init__(self) -> None:
        self.waiting: dict[str, dict[str, Any]] = {}
        """By what Lightning calls it: how it was logged, and, of a number, its sum so far."""

    def state(
        self, trainer: pl.Trainer, model: pl.LightningModule, *, epoch_ends: bool
    ) -> dict[str, Any]:
        """In plain values, of this rank; asked for between two batches, or at an epoch's end."""
        self.go_on(trainer)
        results = dict(_logged(trainer))
        # Lightning resets those which it was given, at the start of the next epoch
        given = {id(one.value) for one in results.values() if not one.is_tensor}
        metrics = {
            name: {"count": metric.update_count, "state": _copied(metric.metric_state)}
            for name, metric in metrics_in(model).items()
            if metric.update_called and not (epoch_ends and id(metric) in given)
        }
        logged = {} if epoch_ends else self.waiting | {
            key: _entry(one) for key, one in results.items()
            if one.meta.on_epoch and not one.has_reset and not one.meta.is_custom_reduction
        }  # fmt: skip
        return {
            "metrics": metrics,
            "logged": logged,
            "line": [] if epoch_ends else _line_due(trainer),
        }

    def restore(
        self, trainer: pl.Trainer, model: pl.LightningModule, state: Mapping[str, Any]
    ) -> None:
        """Go on from what `state` returned, before the first batch."""
        known = metrics_in(model)
        for name in state["metrics"].keys() & known.keys():
            metric, saved = known[name], state["metrics"][name]
            for key, value in _copied(saved["state"], metric.device).items():
                setattr(metric, key, value)
            metric._update_count = saved["count"]
        self.waiting = _copied(state["logged"], model.device)
        if state["line"]:  # Lightning hands it to the loggers behind the hooks of its batch
            step, line = state["line"]
            for logger in trainer.loggers:
                logger.log_metrics(line, step=step)
                logger.save()

    def go_on(self, trainer: pl.Trainer) -> None:
        """Add what waits to what Lightning has begun since."""
        results = _logged(trainer) if self.waiting else {}
        for key in self.waiting.keys() & results.keys():
            one, sums = results[key], self.waiting.pop(key)["sums"]
            for name, before in sums.items():
                now = getattr(one, name)
                is_extreme = one.meta.is_max_reduction or one.meta.is_min_reduction
                setattr(one, name, one.meta.reduce_fx(now, before) if is_extreme else now + before)
            one._computed = None

    def end(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        """Let the end of the epoch have also what was not logged again."""
        self.go_on(trainer)
        for key, entry in self.waiting.items():
            is_metric = not entry["sums"]
            of_model = model.get_submodule(entry["settings"]["metric_attribute"] or "")
            results: Any = _logged(trainer)
            results.log(
                *entry["names"],
                of_model if is_metric else entry["sums"]["value"],
                **entry["settings"],
                **entry["sync"],
                reduce_fx=REDUCED[entry["reduced"]],
                sync_dist_fn=trainer.strategy.reduce,
                batch_size=1,
            )
            for name, value in entry["sums"].items():
                setattr(results[key], name, value)
        self.waiting = {}


def _logged(trainer: pl.Trainer) -> Mapping[str, Any]:
    return trainer.fit_loop.epoch_loop._results


def _entry(one: Any) -> dict[str, Any]:
    meta, names = one.meta, ["value"] if one.is_tensor else []
    if one.is_tensor and meta.is_mean_reduction:
        names.append("cumulated_batch_size")
    return {
        "names": [meta.fx, meta.name],
        "settings": {name: getattr(meta, name) for name in SETTINGS},
        "sync": {"sync_dist": meta.sync.should, "rank_zero_only": meta.sync.rank_zero_only},
        "reduced": next(kind for kind in REDUCED if getattr(meta, f"is_{kind}_reduction")),
        "sums": _copied({name: getattr(one, name) for name in names}),
    }


def _copied(value: Any, device: torch.device | None = None) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, Mapping):
        return {key: _copied(item, device) for key, item in value.items()}
    return [_copied(item, device) for item in value] if isinstance(value, list) else value


def _line_due(trainer: pl.Trainer) -> list[Any]:
    """Optimizer step and values of what Lightning logs when the hooks of this batch are over."""
    step = trainer.fit_loop.epoch_loop._batches_that_stepped
    is_due = (step + 1) % trainer.log_every_n_steps == 0 or trainer.should_stop  # type: ignore[attr-defined]
    if not is_due:
        return []
    found = trainer.fit_loop.epoch_loop._results.metrics(on_step=True)["log"]
    line = {name: float(value) for name, value in found.items()}
    return [step, line | {"epoch": trainer.current_epoch}] if line else []
