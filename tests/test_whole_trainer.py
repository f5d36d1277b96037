"""The trainer's keys, the presets of `debug`, and the names of the best checkpoints."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import SMALL
from test_resume import OFTEN, THEIRS, fit
from test_train import command
from theirs import LitData, LitModel

from app import conf
from app.config import check
from app.errors import Refused
from app.fit import run
from app.record.folder import RunFolder
from app.run.checkpoint import CheckpointFiles
from app.run.evaluation import checkpoint_path

ANEW = (*THEIRS, OFTEN, "trainer.reload_dataloaders_every_n_epochs=1")
CUT = {
    "loaders anew": (*ANEW, "data._target_=anew.Resampled"),
    "a list of loaders anew": (*ANEW, "data._target_=anew.Replay", "model._target_=anew.TakesTwo"),
    "workers anew": (*ANEW, "data._target_=anew.Curriculum", "+data.workers=1"),
    "a stream anew": (*ANEW, "+data.stream=true", "model._target_=theirs.TwoOptimizers"),
    "overfit_batches": (*THEIRS, OFTEN, "trainer.overfit_batches=3"),
    "min_epochs": (*SMALL, OFTEN, "callbacks=early_stopping", "trainer.max_epochs=5",
                   "callbacks.early_stopping.patience=1", "callbacks.progress=null",
                   "callbacks.early_stopping.min_delta=9", "trainer.min_epochs=4"),
    "top_k": (*SMALL, "trainer.max_epochs=4", "callbacks.checkpoint.top_k=2",
              "callbacks.checkpoint.filename='{epoch}-{val_loss:.5f}'"),
}  # fmt: skip


@pytest.mark.parametrize("case", CUT)
def test_a_cut_run_goes_on_as_the_whole_one(
    checked: Callable[..., Any], tmp_path: Path, case: str
) -> None:
    whole = fit(checked(*CUT[case], f"run_dir={tmp_path}/whole"), cut_at=None)
    batches = whole.trainer.fit_loop.total_batch_idx + 1
    config = checked(*CUT[case], f"run_dir={tmp_path}/cut")
    for cut_at in (batches // 2, int(0.9 * batches)):
        fit(config, cut_at=cut_at)
    cut = fit(config, cut_at=None)
    assert cut.trainer.global_step == whole.trainer.global_step > 0
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, cut.model.state_dict()[name]), name
    files = [
        {path.name: torch.load(path)["state_dict"] for path in folder.glob("*/*.ckpt")}
        for folder in (tmp_path / "whole", tmp_path / "cut")
    ]
    assert files[0].keys() == files[1].keys()
    assert all(
        torch.equal(tensor, files[1][name][key])
        for name, weights in files[0].items()
        for key, tensor in weights.items()
    )


def test_early_stopping_waits_for_min_epochs(checked: Callable[..., Any], tmp_path: Path) -> None:
    assert fit(checked(*CUT["min_epochs"]), cut_at=None).trainer.current_epoch == 4
    without = (word for word in CUT["min_epochs"] if "min_epochs" not in word)
    shorter = fit(checked(*without, f"run_dir={tmp_path}/without"), cut_at=None)
    assert shorter.trainer.current_epoch == 2


def test_overfit_batches_trains_as_lightning_does(
    checked: Callable[..., Any], tmp_path: Path
) -> None:
    ours = fit(checked(*THEIRS, "trainer.overfit_batches=3", "clip=none"), cut_at=None)
    pl.seed_everything(42, workers=True)
    model, data = LitModel(), LitData()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock = pl.Trainer(
            max_epochs=3, overfit_batches=3, accelerator="cpu", logger=False,
            enable_checkpointing=False, enable_progress_bar=False, num_sanity_val_steps=0,
            enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        stock.fit(model, data)
    assert stock.global_step == ours.trainer.global_step == 9
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, ours.model.state_dict()[name]), name


def test_a_share_to_overfit_on_validates_as_far_as_typed(checked: Callable[..., Any]) -> None:
    words = (*SMALL, "trainer.overfit_batches=0.5", "trainer.limit_train_batches=null")
    trainer = fit(checked(*words, "trainer.limit_val_batches=1"), cut_at=None).trainer
    assert trainer.num_val_batches == [1]
    assert trainer.limit_train_batches == 0.5


PLUGINS = {
    "Io": "a CheckpointIO, as the files of a run are made and read by callbacks.checkpoint; leave "
    "it out",
    "Cluster": "a ClusterEnvironment, as the ranks are started by strategy and launch; leave it "
    "out, and type strategy=ddp",
    "Half": "a Precision beside that of the group, bf16-mixed; type precision=fp32",
    "nothing": "a Tensor; leave it out",
}


@pytest.mark.parametrize("name", PLUGINS)
def test_a_plugin_that_does_what_is_done_here_is_refused(
    checked: Callable[..., Any], name: str
) -> None:
    config = checked(*SMALL, f"+trainer.plugins.a._target_=plugged.{name}", "precision=bf16")
    with pytest.raises(Refused) as refusal:
        fit(config, cut_at=None)
    said = "trainer.plugins.a must be a LayerSync or a Precision, got "
    assert str(refusal.value) == said + PLUGINS[name]


def test_other_plugins_act(checked: Callable[..., Any]) -> None:
    made = fit(checked(*SMALL, "+trainer.plugins.a._target_=plugged.Half"), cut_at=None)
    assert {p.dtype for p in made.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["simple", "advanced", "pytorch"])
def test_a_profile_is_in_the_folder_of_the_run(checked: Callable[..., Any], kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = checked(*SMALL, f"trainer.profiler={kind}")
        fit(config, cut_at=None)
    found = {path.name.partition("-")[0] + path.suffix for path in Path(config.run_dir).glob("*-*")}
    assert found == ({"fit.txt", "fit.json"} if kind == "pytorch" else {"fit.txt"})


DEBUG = sorted(path.stem for path in (Path(conf.__file__).parent / "debug").glob("*.yaml"))
LATE = {
    "scheduler=steps": (),
    "accumulate=schedule": (),
    "accumulate=effective": ("accumulate.batch_size=1024",),
    "averaging=swa": ("averaging.start=20",),
    "trainer.val_check_interval=50": (),
    "experiment=ema": (),
}


@pytest.mark.parametrize("preset", DEBUG)
@pytest.mark.parametrize("choice", LATE)
def test_a_debug_preset_goes_with_what_is_made_for_a_whole_run(
    composed: Callable[..., Any], preset: str, choice: str
) -> None:
    config = check(composed(f'debug="{preset}"', choice, *LATE[choice]))
    assert config.debug == (None if preset == "none" else preset)
    assert config.resume == ("auto" if preset == "none" else "never")


def test_a_debug_run_says_what_it_changes_and_leaves_a_real_one_alone(tmp_path: Path) -> None:
    small = ("name=mine", "trainer.accelerator=cpu", "logger=csv", "callbacks.progress=null")
    (tmp_path / "runs/mine").mkdir(parents=True)
    (tmp_path / "runs/mine/result.json").write_text("real")
    typed = ("debug=fast", *small, "trainer.limit_val_batches=2", "scheduler=steps")
    said = command("app.train", *typed, cwd=tmp_path)
    changes = [line for line in said.splitlines() if line.startswith("debug=fast changes")]
    assert "debug=fast changes trainer.limit_train_batches null -> 1" in changes
    assert "debug=fast changes trainer.max_epochs 30 -> 1" in changes
    assert not any("limit_val_batches" in line for line in changes)
    assert (tmp_path / "runs/mine/result.json").read_text() == "real"
    result = json.loads((tmp_path / "runs/debug/mine/result.json").read_text())
    assert (result["debug"], result["optimizer_steps"]) == ("fast", 1)
    again = command("app.check", "debug=nan", cwd=tmp_path)
    assert "debug=nan changes trainer.detect_anomaly false -> true" in again


def test_debug_nan_names_the_operation(composed: Callable[..., Any]) -> None:
    cfg = composed('debug="nan"', *SMALL, "optimizer.lr=1e38", "clip=none")
    warnings.simplefilter("ignore")  # of its cost; pytest puts the filters back
    with pytest.raises(RuntimeError, match="Backward0' returned nan"):
        run(cfg, typed=[])


@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_best_checkpoints_are_kept_by_their_names(
    composed: Callable[..., Any], tmp_path: Path, mode: str
) -> None:
    template = "epoch={epoch}-{val/acc:.3f}-{step:03d}"
    typed = ("callbacks.checkpoint.top_k=2", f"callbacks.checkpoint.filename='{template}'",
             f"callbacks.checkpoint.mode={mode}", "trainer.max_epochs=4")  # fmt: skip
    result = run(composed(*SMALL, *typed), typed=[])
    folder = RunFolder(tmp_path / "run")
    top = {folder.path / path: score for path, score in result["top_checkpoints"].items()}
    best = (min if mode == "min" else max)(top.values())
    others = {folder.checkpoints / f"{name}.ckpt" for name in ("best", "last", "previous")}
    assert {*folder.checkpoints.glob("*")} == others | top.keys()
    assert len(top) == 2
    of_best = next(path for path, score in top.items() if score == best)
    assert of_best.read_bytes() == (folder.checkpoints / "best.ckpt").read_bytes()
    assert result["metrics"]["val_loss"] == best
    for path in top:
        state = CheckpointFiles().load_checkpoint(path)
        assert path.name.startswith(f"epoch={state['epoch'] + 1}-0.")
        assert path.name.endswith(f"-{state['global_step']:03d}.ckpt")
        assert (
            checkpoint_path(folder, path.stem if "." not in path.stem else path.name[:-5]) == path
        )
