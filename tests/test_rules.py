"""Each rule between groups, and the failure it prevents: what the run would have come to."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import pytest
from conftest import SMALL
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from app.config import check, of_a_run
from app.errors import Refused
from app.monitored import followed
from app.run.build import Run, build


def learning_rates(run: Run) -> set[float]:
    return {group["lr"] for group in run.trainer.optimizers[0].param_groups}


def has_no_schedule(run: Run) -> bool:
    return run.trainer.lr_scheduler_configs == []


def kept_its_rate(run: Run) -> bool:
    return learning_rates(run) == {0.2}


def never_grew_its_window(run: Run) -> bool:
    return run.trainer.global_step == run.trainer.fit_loop.total_batch_idx + 1


def logged_no_raw_metric(run: Run) -> bool:
    return not any(name.startswith("raw_") for name in run.trainer.callback_metrics)


def kept_no_best(run: Run) -> bool:
    best, last = run.checkpoints().values()
    return best == last and not run.top()


def trained(run: Run) -> bool:
    return run.trainer.global_step > 0


def silent() -> AbstractContextManager[None]:
    """Nothing is raised, and nothing said: a warning is an error in these tests."""
    return nullcontext()


THEIRS = ("model=custom", "model._target_=theirs.LitModel", "data=custom",
          "data._target_=theirs.LitData", "optimizer=none")  # fmt: skip
ENDLESS = ("trainer.max_epochs=null", "trainer.max_minutes=1")
NO_VALIDATION = "trainer.limit_val_batches=0"

FAILURES = [
    (("scheduler=cosine", *THEIRS), silent(), lambda run: len(run.trainer.lr_scheduler_configs) == 1
     and type(run.trainer.lr_scheduler_configs[0].scheduler).__name__ == "OneCycleLR"),
    (("scheduler=cosine", *ENDLESS),
     pytest.raises(ValueError, match="scheduler needs the number of optimizer steps"), None),
    (("tuner=lr_find", "scheduler=custom", "+scheduler.max_lr=0.1", "+scheduler.total_steps=99",
      "scheduler.interval=step",
      "scheduler._target_=torch.optim.lr_scheduler.OneCycleLR", "optimizer.lr=0.02"), silent(),
     lambda run: run.trainer.optimizers[0].param_groups[0]["initial_lr"] == 0.1 / 25),
    (("scheduler=steps",), silent(), kept_its_rate),
    (("scheduler=plateau", NO_VALIDATION),
     pytest.raises(MisconfigurationException, match="val_loss which is not available"), None),
    (("callbacks=early_stopping", NO_VALIDATION),
     pytest.raises(RuntimeError, match="val_loss` which is not available"), None),
    (("callbacks.checkpoint.top_k=3", NO_VALIDATION), silent(), kept_no_best),
    (("accumulate=schedule",), silent(), never_grew_its_window),
    (("averaging=swa", "averaging.start=2"),
     pytest.warns(UserWarning, match="averaging never started"), trained),
    (("averaging=swa", *ENDLESS),
     pytest.raises(ValueError, match=r"averaging\.start must be a number of epochs"), None),
    (("averaging=ema", *ENDLESS),
     pytest.raises(ValueError, match=r"averaging\.decay must be given where the length"), None),
    (("averaging=ema", "averaging.validate=both", NO_VALIDATION), silent(), logged_no_raw_metric),
    (("precision=fp16",),
     pytest.warns(UserWarning, match="Using `precision='bf16-mixed'` instead"), trained),
    (("model.in_features=39",),
     pytest.raises(RuntimeError, match="unflatten: Provided sizes"), None),
    (("model.num_classes=3",), pytest.raises(IndexError, match=r"Target . is out of bounds"), None),
    (("+callbacks.x._target_=lightning.pytorch.callbacks.GradientAccumulationScheduler",
      "+callbacks.x.scheduling={0:2}"),
     pytest.raises(Refused, match="of which ours know nothing"), None),
    (("sharing=shared", THEIRS[0], "model._target_=zoo.models.HasLoaders", "data=none",
      "optimizer=none"), silent(), trained),
    (("callbacks.checkpoint.monitor=zzz",),
     pytest.warns(UserWarning, match="monitor=zzz is not logged by Cnn1d"), trained),
    (("callbacks.checkpoint.monitor=zzz", *THEIRS),
     pytest.warns(UserWarning, match="monitor=zzz is not logged by LitModel"), trained),
    (("model=graphsage",), pytest.raises(IndexError, match="too many indices for tensor"), None),
    (("data=graph", "data.num_nodes=400"),
     pytest.raises(RuntimeError, match="unflatten: Provided sizes"), None),
]  # fmt: skip


def small(typed: tuple[str, ...]) -> tuple[str, ...]:
    """What makes a run small, without keys that it does not have."""
    if THEIRS[0] in typed:
        return SMALL[1:-2] + SMALL[-1:]
    return SMALL[1:] if "model=graphsage" in typed else SMALL


@pytest.mark.parametrize(
    ("typed", "fails", "came_to"), FAILURES, ids=[" ".join(typed[:2]) for typed, *_ in FAILURES]
)
def test_a_rule_prevents_a_failure(
    composed: Callable[..., Any],
    typed: tuple[str, ...],
    fails: Any,
    came_to: Callable[[Run], bool] | None,
) -> None:
    cfg = composed(*small(typed), *typed)
    with pytest.raises(Refused):
        check(cfg)
    with fails:
        run = build(of_a_run(followed(cfg)), [])
        run.trainer.fit(run.model, datamodule=run.data)
    assert came_to is None or came_to(run)


WITHOUT_THE_HARDWARE = (
    "trainer.devices=", "strategy.tensor_parallel_size=", "strategy.num_replicas=",
    "precision=tf32", "precision=fp8", "memory=checkpointing", "compile=reduce_overhead",
    "trainer.sync_batchnorm needs", "trainer.sync_batchnorm has",
)  # fmt: skip
"""How the rules begin whose failure needs a GPU, or several processes, to be seen."""


def test_every_rule_is_here(composed: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from app.conf.combinations import RULES, Seen

    broken: set[str] = set()

    def note(run: Any) -> None:
        broken.add(next(text for text, is_broken in RULES.items() if is_broken(Seen(run))))

    monkeypatch.setattr("app.conf.schema.check_combinations", note)
    for typed, *_ in FAILURES:
        check(composed(*small(typed), *typed))
    left = {text: [b for b in WITHOUT_THE_HARDWARE if text.startswith(b)] for text in RULES}
    assert {text for text, begins in left.items() if not begins} == broken
    assert sorted(begins for found in left.values() for begins in found) == sorted(
        WITHOUT_THE_HARDWARE
    )


FREE_FORM = {
    "accumulate": {"_target_": "theirs.Accumulation", "by": "epoch", "starts": [0, 90]},
    "accumulate ": {"_target_": "theirs.Accumulation", "micro_batch_size": 8},
    "strategy": {"_target_": "app.parallel.sharded.Sharded"},
    "strategy ": {"_target_": "theirs.Strategy", "num_replicas": 2},
}


@pytest.mark.parametrize("name", FREE_FORM)
def test_a_group_of_the_users_own_is_read_as_far_as_it_goes(
    composed: Callable[..., Any], name: str
) -> None:
    """Without a schema a group has the keys that are typed, and no others: no rule may need one."""
    cfg = composed(*SMALL)
    cfg[name.strip()] = FREE_FORM[name]
    with suppress(Refused):
        assert check(cfg).plain[name.strip()] == FREE_FORM[name]
