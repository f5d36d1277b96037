"""Trials of a study that are ended early: real runs beside a real storage."""

import json
import math
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL
from omegaconf import DictConfig

from app.config import check
from app.errors import Refused
from app.fit import pruning_of, run
from app.record.trials import PRUNED, STORAGE, STUDY, open_study, url
from app.sweep.study import space_of

pytestmark = [
    pytest.mark.skipif(find_spec("optuna") is None, reason="needs pip install -e '.[optuna]'"),
    pytest.mark.filterwarnings("ignore:Deprecated API features detected"),  # Optuna's
]
Trial = Callable[..., dict[str, Any]]
GOOD, HOPELESS = "optimizer.lr=0.02", "optimizer.lr=1e-9"
NAN = ("optimizer.lr=1e30", "clip=none")
NUM_STEPS = 12


@pytest.fixture
def study(tmp_path: Path) -> Any:
    import optuna

    return optuna.create_study(study_name=STUDY, storage=url(tmp_path / STORAGE))


@pytest.fixture
def trial(composed: Callable[..., DictConfig], tmp_path: Path) -> Trial:
    """Run a trial; the content of result.json."""

    def run_(number: int, *typed: str) -> dict[str, Any]:
        here = ("sweep=optuna", f"sweep.trial={number}", f"run_dir={tmp_path}/{number}")
        cfg = composed(*SMALL, "optimizer=adam", "sweep.prune_after_trials=1", *here, *typed)
        run(cfg, typed=[])
        result: dict[str, Any] = json.loads((tmp_path / f"{number}/result.json").read_text())
        return result

    return run_


def values(tmp_path: Path, number: int) -> dict[int, float]:
    found: dict[int, float] = open_study(tmp_path / STORAGE).trials[number].intermediate_values
    return found


@pytest.mark.parametrize("pruner", ["median", "halving"])
def test_a_hopeless_trial_ends_at_its_first_validation_and_a_good_one_is_tested(
    study: Any, trial: Trial, tmp_path: Path, pruner: str
) -> None:
    for number, typed in enumerate([(GOOD,), (HOPELESS,), (GOOD,), NAN]):
        study.ask()
        result = trial(number, f"sweep.pruner={pruner}", "trainer.limit_train_batches=100", *typed)
        is_good = typed == (GOOD,)
        assert result["status"] == ("finished" if is_good else "pruned")
        assert result["optimizer_steps"] == (200 if is_good else 100)
        assert ("test_loss" in result["metrics"]) == is_good
        reported = values(tmp_path, number)
        assert list(reported) == ([1000, 2000] if is_good else [1000])
        last, measured = list(reported.values())[-1], result["metrics"]["val_loss"]
        assert last == (math.inf if typed == NAN else measured)
        if is_good:
            study.tell(number, measured)


def test_epochs_compare_between_batch_sizes_and_within_an_epoch(
    study: Any, trial: Trial, tmp_path: Path
) -> None:
    typed = ("trainer.val_check_interval=0.5", "trainer.max_epochs=1", "sweep.prune_after_epochs=1")
    for number, batches in enumerate((6, 4)):
        study.ask()
        result = trial(number, GOOD if number == 0 else HOPELESS, *typed,
                       f"trainer.limit_train_batches={batches}")  # fmt: skip
        assert list(values(tmp_path, number)) == [500, 1000]
        assert result["optimizer_steps"] == batches  # it was pruned at the second
        study.tell(number, result["metrics"]["val_loss"])
    assert result["status"] == "pruned"
    assert trial(1, HOPELESS, *typed, "trainer.limit_train_batches=4") == result


def test_a_trial_that_is_run_again_reports_no_validation_twice(
    study: Any, trial: Trial, tmp_path: Path
) -> None:
    study.ask().report(0.125, 1000)  # before it was cut, without a checkpoint
    result = trial(0, GOOD)
    assert values(tmp_path, 0) == {1000: 0.125, 2000: result["metrics"]["val_loss"]}


def test_what_was_decided_of_a_trial_stands_when_it_is_run_again(
    study: Any, trial: Trial, tmp_path: Path
) -> None:
    asked = study.ask()
    asked.report(2.0, 500)
    asked.set_user_attr(PRUNED, True)
    cut = trial(0, GOOD)
    assert (cut["status"], cut["optimizer_steps"]) == ("pruned", NUM_STEPS / 2)
    asked = study.ask()
    assert trial(1, GOOD)["status"] == "finished"
    asked.set_user_attr(PRUNED, True)  # at its last validation, and was cut after the fit
    path = tmp_path / "1/result.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "status": "failed"}))
    again = trial(1, GOOD)
    assert (again["status"], again["optimizer_steps"]) == ("pruned", NUM_STEPS)
    assert "test_loss" not in again["metrics"]


def test_an_objective_that_no_validation_measures_is_said(study: Any, trial: Trial) -> None:
    study.ask()
    said = (
        "objective=val_loss was not there after a validation: the trial could not be pruned; name "
        "a metric of the validation, or type sweep.pruner=none"
    )
    with pytest.warns(UserWarning, match=f"^{re.escape(said)}$"):
        trial(0, "trainer.limit_val_batches=0", "callbacks.checkpoint.monitor=null")


def test_nothing_prunes_what_is_no_trial_or_cannot_be_pruned(
    composed: Callable[..., DictConfig], tmp_path: Path
) -> None:
    for typed in (
        (),
        ("sweep=optuna",),
        ("sweep=optuna", "sweep.trial=0", "sweep.pruner=none"),
        ("sweep=optuna", "sweep.trial=0", "objective=test_loss"),
    ):
        assert pruning_of(check(composed(*typed))) == []
    with pytest.raises(Refused) as refused:
        pruning_of(check(composed("sweep=optuna", "sweep.trial=0")))
    assert str(refused.value) == (
        f"run_dir must be in the folder of the study, beside its study.db, got {tmp_path}/run; "
        "leave run_dir away, or type sweep.pruner=none"
    )


# spaces as the documentation of Hydra's Optuna sweeper, and others, type them
@pytest.mark.parametrize(
    "typed",
    [
        ["optimizer.lr=tag(log,interval(1e-5,1))"],
        ["model.channels=tag(log,interval(1,64))"],
        ["clip.max_norm=interval(0.1,3.0)", "data.batch_size=interval(4,16)"],
        ["x=interval(-5.5,5.5)", "y=choice(-5,0,5)"],
        ["averaging=none,ema", "seed=range(1,4)", "name=fixed"],
        ["z=range(0.1,0.9,step=0.2)", "optimizer=choice('sgd',adam)"],
        ["w=shuffle(range(1,5))", "v=shuffle(a,b,c)"],
        ["model.hidden_sizes=choice([3,4],[5])", "+new.key=1.0,2.0", "++other=null,true"],
        ["a=1", "b='x y'", "c=interval(0,1)"],
        ["dropout=range(0,10,step=5)"],
    ],
)
def test_a_space_is_the_one_that_hydras_own_sweeper_makes(typed: list[str]) -> None:
    import optuna
    from hydra_plugins.hydra_optuna_sweeper._impl import create_params_from_overrides
    from optuna.distributions import BaseDistribution

    theirs, their_fixed = create_params_from_overrides(typed)
    assert all(isinstance(one, BaseDistribution) for one in theirs.values())
    fixed, space = space_of(typed)
    assert fixed == their_fixed
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    trial = study.ask()
    values = {key: suggest(trial) for key, suggest in space.items()}
    assert (values, list(values)) == (trial.params, list(theirs))
    for key, distribution in trial.distributions.items():
        if not any(word.startswith((f"{key}=shuffle", "v=")) for word in typed):
            assert distribution == theirs[key]
