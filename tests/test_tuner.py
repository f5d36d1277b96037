"""The finders on real runs: their answers are configuration, and they leave nothing behind."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL
from lightning.pytorch import Callback
from omegaconf import DictConfig, OmegaConf
from theirs import LitData, LitModel, TwoOptimizers

from app.accumulate import Accumulation, ConstantAccumulation
from app.config import Config, check, with_overrides
from app.errors import Refused
from app.fit import built
from app.process.asked import asked
from app.run.build import build
from app.throwaway.run import Steps, throwaway
from app.throwaway.samples import longest_first, look
from app.tuner.answers import cache_key, read_tuned
from app.tuner.find import find
from app.tuner.keys import startable
from app.tuner.keys import typed as in_words
from app.tuner.lr import range_test
from app.tuner.probe import is_out_of_memory

THEIRS = ("model=custom", "model._target_=theirs.LitModel", "data=custom",
          "data._target_=theirs.LitData", "optimizer=none", "trainer.max_epochs=2", "logger=csv",
          "callbacks.progress=null", "trainer.accelerator=cpu")  # fmt: skip
LR = ("tuner=lr_find", "tuner.cache=null", "tuner.lr.num_steps=40")
BATCH = ("tuner=batch_size", "tuner.cache=null", "tuner.batch_size.min_batches=1")


@pytest.fixture
def found(composed: Callable[..., DictConfig], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Compose and search; returns the overrides."""

    def find_(*overrides: str) -> dict[str, Any]:
        (tmp_path / "run").mkdir(exist_ok=True)
        return find(check(startable(composed(*overrides))), tmp_path / "run")

    return find_


def weights_after(config: Config) -> list[torch.Tensor]:
    run = build(config.but(tuner=None), [])
    run.trainer.fit(run.model, datamodule=run.data)
    return list(run.model.state_dict().values())


def sweep(config: Config, **changes: Any) -> tuple[list[float], list[float]]:
    rates, losses, complete = range_test(
        config, settings=config.tuner.lr, callbacks=[],
        **{"base": 0.1, "optimizer": None, "from_now": False, **changes},
    )  # fmt: skip
    assert complete
    return rates, losses


def test_the_log_says_nothing_of_what_a_search_averages(
    found: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "root")
    found(*BATCH, "averaging=ema", "tuner.batch_size.max_val=4", "trainer.accelerator=cpu")
    assert [one.message for one in caplog.records if one.name.startswith("app.")] == []


def test_finders_rng_finders_disk_lr_scheduler_the_run_equals_the_one_with_overrides_typed(
    composed: Callable[..., DictConfig], found: Callable[..., Any], tmp_path: Path
) -> None:
    typed = ("tuner=full", "tuner.cache=null", "scheduler=cosine", "trainer.max_epochs=2",
             "tuner.batch_size.max_val=64", "optimizer=adamw", "logger=csv",
             "callbacks.progress=null")  # fmt: skip
    overrides = found(*typed)
    assert set(overrides) == {"data.batch_size", "accumulate.factor", "optimizer.lr"}
    assert not list(tmp_path.rglob("*.ckpt"))
    after = weights_after(check(with_overrides(composed(*typed), overrides)))
    by_hand = in_words(overrides).split()
    for one, other in zip(after, weights_after(check(composed(*typed, *by_hand))), strict=True):
        assert torch.equal(one, other)


def test_the_folder_has_the_answers_their_provenance_tables_and_plots(
    found: Callable[..., Any], tmp_path: Path
) -> None:
    overrides = found(*SMALL, "tuner=full", "tuner.cache=null", "tuner.batch_size.max_val=8",
                      "tuner.lr.num_steps=40")  # fmt: skip
    run = tmp_path / "run"
    names = {path.name for path in run.iterdir()}
    assert names == {"tuned.yaml", "batch_size.csv", "batch_size.png", "lr_find.csv", "lr_find.png"}
    assert read_tuned(run / "tuned") == read_tuned(run) == overrides
    assert OmegaConf.load(run / "tuned.yaml").provenance.batch_size.trials == 3
    rules = [line.split(",")[3] for line in (run / "lr_find.csv").read_text().splitlines()]
    assert {"slope", "valley", "minimum", "steepest"} <= set(rules)


def test_finders_rerun_a_second_run_of_the_same_kind_does_not_search(
    found: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = (*SMALL, "tuner=batch_size", "tuner.batch_size.max_val=8", f"tuner.cache={tmp_path}/c")
    first = found(*typed)
    assert "fits" in capsys.readouterr().out
    assert found(*typed, "seed=7", "scheduler=cosine") == first
    assert "fits" not in capsys.readouterr().out


def test_the_cache_key_knows_the_source_of_the_model(
    checked: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    keys = set()
    for name, body in (("one", "a = 1"), ("two", "a = 2")):
        (tmp_path / f"{name}.py").write_text(f"from theirs import LitModel\n{body}\n")
        config = checked(*THEIRS, f"model._target_={name}.LitModel", *LR)
        keys.add(cache_key(config.plain, device="cpu"))
    assert len(keys) == 2
    config = checked(*THEIRS, *LR)
    assert cache_key(config.plain, device="cpu") != cache_key(config.plain, device="H200")


class Broken(LitModel):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), self.hparams["lr"])

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        raise OSError("no data today")


def test_finders_exception_a_failed_search_leaves_nothing_behind(
    found: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(OSError, match="no data today"):
        found(*THEIRS, *LR, "model._target_=test_tuner.Broken", "+model.lr=0.1")
    assert list((tmp_path / "run").iterdir()) == []


# ------------------------------------------------------------------------------- the learning rate


def test_finders_strip_and_lr_accumulate_one_point_per_optimizer_step_of_whole_windows(
    checked: Callable[..., Any],
) -> None:
    config = checked(*THEIRS, *LR, "accumulate=constant", "accumulate.factor=2", "+model.lr=0.1")
    counter = Counter()
    rates, losses, _ = range_test(
        config,
        settings=config.tuner.lr,
        base=0.1,
        optimizer=None,
        from_now=False,
        callbacks=[counter],
    )
    assert counter.batches == 2 * len(losses)
    # the first window: the mean of the losses of its two micro-batches
    assert losses[0] == pytest.approx(sum(counter.losses[:2]) / 2, rel=1e-6)
    assert counter.rates[:4] == pytest.approx(rates[:4])
    assert counter.validations == 0  # lr-validation


class Counter(Callback):
    def __init__(self) -> None:
        self.batches = self.validations = 0
        self.losses: list[float] = []
        self.rates: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
        self.batches += 1
        self.losses.append(float(outputs["loss"]))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self.validations += 1


def test_lr_budget_a_sweep_has_its_own_steps_and_cycles_the_loader(
    checked: Callable[..., Any],
) -> None:
    config = checked(*THEIRS, *LR, "trainer.max_epochs=1", "tuner.lr.highest=1e-3", "+model.lr=0.1")
    rates, losses = sweep(config)
    assert len(losses) == len(rates) == 40  # an epoch has ten batches


class Grouped(LitModel):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(
            [
                {"params": self.net[0].parameters(), "lr": 0.01},
                {"params": self.net[3].parameters(), "lr": 0.1},
            ]
        )


class GroupRates(Callback):
    def __init__(self) -> None:
        self.ratios: set[float] = set()

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        first, second = trainer.optimizers[0].param_groups
        self.ratios.add(round(second["lr"] / first["lr"], 6))


def test_lr_groups_keep_their_ratios_in_the_sweep(checked: Callable[..., Any]) -> None:
    config = checked(*THEIRS, *LR, "model._target_=test_tuner.Grouped", "+model.lr=0.1")
    groups = GroupRates()
    range_test(
        config,
        settings=config.tuner.lr,
        base=0.1,
        optimizer=None,
        from_now=False,
        callbacks=[groups],
    )
    assert groups.ratios == {10.0}


class TwoRates(TwoOptimizers):
    def __init__(self, first: float, second: float) -> None:
        super().__init__()
        self.rates = first, second

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        super().training_step(batch, batch_idx)
        x, y = batch
        return torch.nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> Any:
        layers = self.net[0], self.net[3]
        return [
            torch.optim.SGD(layer.parameters(), lr=lr)
            for layer, lr in zip(layers, self.rates, strict=True)
        ]


class BothRates(Callback):
    def __init__(self) -> None:
        self.seen: list[tuple[float, float]] = []

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        one, other = (optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers)
        self.seen.append((one, other))


def test_lr_optimizers_each_is_swept_while_the_others_are_held(
    checked: Callable[..., Any], found: Callable[..., Any]
) -> None:
    typed = (*THEIRS, *LR, "model._target_=test_tuner.TwoRates", "+model.first=0.1",
             "+model.second=0.2", "tuner.lr.key=[model.first,model.second]")  # fmt: skip
    config = checked(*typed)
    both = BothRates()
    range_test(
        config,
        settings=config.tuner.lr,
        base=0.2,
        optimizer=1,
        from_now=False,
        callbacks=[both],
    )
    assert {one for one, _ in both.seen} == {0.1}
    assert len({other for _, other in both.seen}) == len(both.seen) > 10
    assert set(found(*typed, "tuner.lr.on_doubt=use")) <= {"model.first", "model.second"}


def test_a_key_that_holds_no_number_is_refused(found: Callable[..., Any]) -> None:
    with pytest.raises(Refused) as refusal:
        found(*THEIRS, *LR)
    assert str(refusal.value) == (
        "tuner.lr.key finds nothing to tune: none of optimizer.lr, model.lr, model.learning_rate "
        "holds a number; type tuner.lr.key=KEY, such as model.learning_rate with "
        "+model.learning_rate=0.1"
    )


@pytest.mark.parametrize("preset", ["sgd", "adamw"])
def test_lr_milestone_a_search_inside_a_fit_changes_nothing_but_the_rate(
    checked: Callable[..., Any], preset: str
) -> None:
    typed = (*SMALL, f"optimizer={preset}", "averaging=ema", "scheduler=cosine", "model=cnn1d_bn",
             "trainer.max_epochs=3")  # fmt: skip
    plain = weights_after(checked(*typed))
    config = checked(*typed, "tuner=milestones", "tuner.milestones=[1,2]", "tuner.lr.num_steps=20",
                     "tuner.lr.lowest=1e-9", "tuner.lr.highest=1e-8")  # fmt: skip
    Path(config.run_dir).mkdir(exist_ok=True)
    run = build(config, [])
    run.trainer.fit(run.model, datamodule=run.data)
    # at such rates the curve has no descent: in doubt the rate is kept, and all else is as before
    for one, other in zip(plain, run.model.state_dict().values(), strict=True):
        assert torch.equal(one, other)


# --------------------------------------------------------------------------------- the micro-batch


@pytest.mark.parametrize(
    ("bounds", "size"),
    [
        (("tuner.batch_size.max_val=7",), 7),  # bs-max: tried, and never passed
        ((), 40),  # bs-dataset
        (("tuner.batch_size.min_batches=4",), 10),
        (("accumulate=effective", "accumulate.batch_size=36", "tuner.batch_size.min_batches=4",
          "accumulate.micro_batch_size=${data.batch_size}"), 9),  # bs-effective
    ],
)  # fmt: skip
def test_bs_max_bs_dataset_bs_effective_bounds_hold(
    found: Callable[..., Any], bounds: tuple[str, ...], size: int
) -> None:
    assert found(*THEIRS, *BATCH, "+data.batch_size=4", *bounds) == {"data.batch_size": size}


class Hungry(LitModel):
    """Runs out of memory above `trains` samples of training, or `evaluates` of validation."""

    def __init__(self, trains: int = 5, evaluates: int = 10_000) -> None:
        super().__init__()
        self.trains = trains
        self.evaluates = evaluates

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if len(batch[0]) > self.trains:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if len(batch[0]) > self.evaluates:
            raise RuntimeError("HIP out of memory. Tried to allocate 2 GiB.")
        super().validation_step(batch, batch_idx)


class EvalData(LitData):
    def val_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(self.train_dataloader().dataset, self.batch_size)


@pytest.mark.parametrize("mode", ["binsearch", "power"])
@pytest.mark.parametrize(("evaluates", "size"), [(10_000, 5), (3, 3)])
def test_bs_untested_and_bs_eval_the_answer_ran_a_training_and_an_evaluation_step(
    found: Callable[..., Any], mode: str, evaluates: int, size: int
) -> None:
    overrides = found(
        *THEIRS, *BATCH, "model._target_=test_tuner.Hungry", f"+model.evaluates={evaluates}",
        "data._target_=test_tuner.EvalData", "+data.batch_size=4",
        f"tuner.batch_size.mode={mode}", "tuner.batch_size.init_val=1",
    )  # fmt: skip
    largest_power = max(n for n in (1, 2, 4) if n <= size)
    assert overrides == {"data.batch_size": size if mode == "binsearch" else largest_power}


def test_a_model_that_never_fits_is_a_clear_error(found: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="1 does not fit"):
        found(*THEIRS, *BATCH, "model._target_=test_tuner.Hungry", "+model.evaluates=0",
              "data._target_=test_tuner.EvalData", "+data.batch_size=4")  # fmt: skip


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError("x"), True),
        (RuntimeError("HIP out of memory. Tried to allocate"), True),
        (RuntimeError("XPU out of memory"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_bs_oom_kinds_are_recognised(error: BaseException, is_memory: bool) -> None:
    assert is_out_of_memory(error) is is_memory


class Loaders(LitData):
    def train_dataloader(self) -> Any:
        return {"a": super().train_dataloader(), "b": super().train_dataloader()}

    val_dataloader = None


class FromTwo(LitModel):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step(batch["a"], batch_idx)


def test_bs_loaders_without_validation_and_with_several_training_loaders(
    found: Callable[..., Any], checked: Callable[..., Any]
) -> None:
    typed = (*THEIRS, *BATCH, "model._target_=test_tuner.FromTwo", "+data.batch_size=4",
             "data._target_=test_tuner.Loaders", "tuner.batch_size.max_val=8")  # fmt: skip
    assert found(*typed) == {"data.batch_size": 8}
    assert look(checked(*typed), 1)[1] == 40


def test_samples_of_different_lengths_are_probed_longest_first() -> None:
    samples = [torch.zeros(n % 7 + 1) for n in range(20)]
    loader = longest_first(torch.utils.data.DataLoader(samples, batch_size=2))  # type: ignore
    assert {tuple(batch.shape) for batch in loader} == {(2, 7)}
    alike = torch.utils.data.DataLoader([torch.zeros(3)] * 4, batch_size=2)  # type: ignore
    assert longest_first(alike) is alike


class HungryOnOneRank(Hungry):
    """Runs out of memory above 5 samples on rank 1, above 100 on any other."""

    def __init__(self) -> None:
        super().__init__(trains=5 if os.environ.get("RANK") == "1" else 100)


@pytest.mark.slow
def test_lr_spawn_the_range_test_runs_in_several_processes_and_is_told_once(tmp_path: Path) -> None:
    printed = command(
        "app.tune", *THEIRS, "tuner=lr_find", "tuner.cache=null", "tuner.lr.num_steps=40",
        "tuner.lr.on_doubt=use", "+model.lr=0.1", "strategy=ddp_spawn", "trainer.devices=2",
        "fit=false", "name=found", cwd=tmp_path,
    )  # fmt: skip
    assert printed.count("tuner: model.lr=") == 1
    assert read_tuned(tmp_path / "runs/found").keys() == {"model.lr"}
    assert (tmp_path / "runs/found/lr_find.png").exists()


@pytest.mark.slow
def test_bs_distributed_all_ranks_take_the_answer_of_the_one_that_runs_out(tmp_path: Path) -> None:
    printed = command(
        "app.tune", *THEIRS, *BATCH, "model._target_=test_tuner.HungryOnOneRank",
        "+data.batch_size=4", "strategy=ddp", "trainer.devices=2", "fit=false", cwd=tmp_path,
    )  # fmt: skip
    assert "data.batch_size=5: " in printed
    assert "data.batch_size=6 does not fit" in printed


# ----------------------------------------------------------------------------------- whole commands


def test_bs_milestone_the_micro_batch_changes_inside_the_fit_and_the_effective_batch_does_not(
    checked: Callable[..., Any],
) -> None:
    config = checked(
        *THEIRS, *BATCH, "+data.batch_size=4", "accumulate=effective", "accumulate.batch_size=8",
        "accumulate.micro_batch_size=${data.batch_size}", "tuner.batch_size.max_val=8",
        "tuner.milestones=[2]", "trainer.max_epochs=3",
        "model._target_=test_tuner.Grouped",
    )  # fmt: skip
    Path(config.run_dir).mkdir(exist_ok=True)
    sizes = Sizes()
    run = built(config, [sizes])
    run.trainer.fit(run.model, datamodule=run.data)
    assert sizes.of_epoch == {0: 4, 1: 4, 2: 8}
    assert run.trainer.global_step == 3 * 40 // 8


class Sizes(Callback):
    def __init__(self) -> None:
        self.of_epoch: dict[int, int] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, index: int) -> None:
        self.of_epoch[trainer.current_epoch] = len(batch[0])


def command(*typed: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *typed],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_finders_resume_a_search_is_made_once_and_its_answer_is_reused(tmp_path: Path) -> None:
    typed = ("optimizer=adamw", "trainer.max_epochs=1", "tuner.lr.num_steps=60")
    first = command("app.train", "name=a", "tuner=lr_find", *typed, cwd=tmp_path)
    line = next(line for line in first.splitlines() if line.startswith("tuner: optimizer.lr="))
    override = line.removeprefix("tuner: ")
    # the same run again, as a requeued job would
    result = tmp_path / "runs/a/result.json"
    result.write_text(result.read_text().replace('"finished"', '"interrupted"'))
    again = command("app.train", "name=a", "tuner=lr_find", *typed, cwd=tmp_path)
    assert "tuner:" not in again
    assert "continuing from" in again
    # another run of the same kind, then the file, then the override typed: the same weights
    assert "(from runs/.tuned/" in command(
        "app.train", "name=b", "tuner=lr_find", *typed, cwd=tmp_path
    )
    command("app.train", "name=c", "+tuned=runs/a/tuned", *typed[:2], cwd=tmp_path)
    command("app.train", "name=d", override, *typed[:2], cwd=tmp_path)
    weights = [
        torch.load(tmp_path / f"runs/{name}/checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for name in "abcd"
    ]
    for others in weights[1:]:
        assert all(torch.equal(weights[0][name], others[name]) for name in others)
    only = command("app.tune", "fit=false", "name=e", "tuner.batch_size.max_val=4", cwd=tmp_path)
    assert "tuner: data.batch_size=4" in only
    assert not (tmp_path / "runs/e/checkpoints").exists()


@pytest.mark.slow
def test_ctrl_c_leaves_the_answer_so_far(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "app.tune", "name=a", "tuner.batch_size.min_batches=1"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("tuner: data.batch_size=16 fits"):
                process.send_signal(signal.SIGINT)
                break
        rest = process.stdout.read()
    assert process.returncode == 128 + signal.SIGINT, rest
    assert "tuner: interrupted; so far data.batch_size=" in rest
    # the signal may come between the line and the search's own note of that trial
    assert read_tuned(tmp_path / "runs/a/tuned_so_far.yaml")["data.batch_size"] >= 8


class NotesHandler(Callback):
    """Notes who is called at SIGTERM while a fit trains."""

    def on_train_batch_end(self, *args: Any) -> None:
        self.handler = signal.getsignal(signal.SIGTERM)


def test_a_finder_is_stopped_by_our_handler_not_by_one_that_waits_for_other_ranks(
    checked: Callable[..., Any],
) -> None:
    notes = NotesHandler()
    with asked.listening():
        ours = signal.getsignal(signal.SIGTERM)
        run = throwaway(checked(*SMALL), steps=Steps(1), validates=False, callbacks=[notes])
        run.trainer.fit(run.model, datamodule=run.data)
    assert notes.handler == ours


# ------------------------------------------------------------------------ techniques of the user's


class Alternating(Accumulation):
    """Two micro-batches in the first epoch, `later` in all others."""

    def __init__(self, *, later: int) -> None:
        super().__init__(weight_by=None)
        self.later = later

    @property
    def schedules(self) -> tuple[dict[int, int], dict[int, int]]:
        return {0: 2, 1: self.later}, {0: 1}


class Doubled(ConstantAccumulation):
    """Twice the factor that is typed."""

    def __init__(self, *, half: int) -> None:
        super().__init__(factor=2 * half, weight_by=None)


class Noted(Callback):
    """Clips nothing."""


THEIR_TECHNIQUES: dict[str, dict[str, Any]] = {
    "accumulate-rule": {"accumulate": {"_target_": "test_tuner.Alternating", "later": 3}},
    "accumulate-constant": {"accumulate": {"_target_": "test_tuner.Doubled", "half": 1}},
    "accumulate-lightning": {
        "accumulate": {
            "_target_": "lightning.pytorch.callbacks.GradientAccumulationScheduler",
            "scheduling": {0: 2},
        }
    },
    "clip": {"clip": {"_target_": "test_tuner.Noted"}},
    "averaging-lightning": {
        "averaging": {"_target_": "lightning.pytorch.callbacks.EMAWeightAveraging", "decay": 0.9}
    },
}


@pytest.mark.filterwarnings("ignore:Turning off the learning rate")
@pytest.mark.parametrize("name", THEIR_TECHNIQUES)
@pytest.mark.parametrize("finder", [BATCH, LR], ids=["batch_size", "lr"])
def test_finders_run_with_techniques_of_the_users_own(
    composed: Callable[..., DictConfig], tmp_path: Path, name: str, finder: tuple[str, ...]
) -> None:
    cfg = composed(*THEIRS, *finder, "+data.batch_size=4", "+model.lr=0.1",
                   *(["tuner.batch_size.max_val=8"] if finder is BATCH else []))  # fmt: skip
    for group, chosen in THEIR_TECHNIQUES[name].items():
        cfg[group] = chosen
    (tmp_path / "run").mkdir()
    overrides = find(check(cfg), tmp_path / "run")
    assert finder is LR or overrides["data.batch_size"] > 0


class OnPlateau(LitModel):
    """Has a schedule of its own that waits for a validation."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"},
        }


def test_a_sweep_of_several_epochs_does_not_wait_for_the_plateau_of_a_validation(
    checked: Callable[..., Any],
) -> None:
    config = checked(*THEIRS, *LR, "model._target_=test_tuner.OnPlateau", "+model.lr=0.1",
                     "trainer.limit_train_batches=4")  # fmt: skip
    _, losses = sweep(config)
    assert len(losses) > 8
