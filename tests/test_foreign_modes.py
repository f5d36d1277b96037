"""What is trained, and in which mode, goes on in a continued run; and ranks know of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, Callback, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from test_averaging import data, ema, read, trainer_for
from test_averaging import pytestmark as warnings_of_lightning
from torch import Tensor, nn

from app.launch.local import run_local
from app.parallel.data_parallel import DataParallel
from app.resume.exact import ExactResume

pytestmark = [
    *warnings_of_lightning,
    pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist"),
    pytest.mark.filterwarnings("ignore:Found .* module.* in eval mode"),
]


class Tuned(pl.LightningModule):
    """A backbone with a norm and a dropout, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3))
        self.head = nn.Linear(4, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self.head(self.backbone(batch[0])), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Filters(Tuned):
    """Gives the optimizer what is trained at the start, as fine-tuning callbacks want it."""

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.01)


class Evaluates(Tuned):
    """Keeps the statistics of a backbone; all of its body from the second epoch on."""

    def on_train_epoch_start(self) -> None:
        self.backbone[1].eval()
        if self.current_epoch > 0:
            self.backbone.eval()


class FreezesAtEpoch(Tuned):
    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.backbone.requires_grad_(False)


class Thaws(Tuned):
    """One layer at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone.requires_grad_(False)

    def on_train_epoch_start(self) -> None:
        if self.current_epoch in (1, 2):
            self.backbone[2 - self.current_epoch].requires_grad_(True)


class FreezesInside(Callback):
    """In mid-run, at a step."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == 5:
            pl_module.backbone[0].requires_grad_(False)
            pl_module.backbone[1].eval()
            pl_module.backbone[1].track_running_stats = False


def finetuning() -> Callback:
    return BackboneFinetuning(
        unfreeze_backbone_at_epoch=1, lambda_func=lambda epoch: 1.5, verbose=False
    )


CASES: dict[str, tuple[type[Tuned], Callable[[], list[Callback]]]] = {
    "BackboneFinetuning": (Filters, lambda: [finetuning()]),
    "eval in on_train_epoch_start": (Evaluates, list),
    "frozen at an epoch": (FreezesAtEpoch, list),
    "thawed at epochs": (Thaws, list),
    "frozen at a step": (Tuned, lambda: [FreezesInside()]),
}


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("cut_at", ["step=6", "step=7", "epoch=1", "step=11"])
@pytest.mark.parametrize("case", CASES)
def test_st_frozen_a_continued_run_trains_what_the_other_one_did(
    tmp_path: Path, case: str, cut_at: str, average: bool
) -> None:
    make, callbacks = CASES[case]

    def fit(path: Path | None) -> Tuned:
        torch.manual_seed(4)
        folder = tmp_path / str(path is None)
        savers = [
            ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}"),
            ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}"),
        ]
        averages, resume = [ema()] if average else [], ExactResume()
        trainer = trainer_for(
            tmp_path, *averages, resume, *callbacks(), *savers, num_sanity_val_steps=0
        )
        model = make()
        trainer.fit(model, resume.resumable(data()), data(), ckpt_path=path)
        return model

    whole = fit(None)
    cut = fit(tmp_path / "True" / f"{cut_at}.ckpt")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, cut.state_dict()[name]), name
    for one, other in zip(whole.parameters(), cut.parameters(), strict=True):
        assert one.requires_grad == other.requires_grad
    modes = [[module.training for module in model.modules()] for model in (whole, cut)]
    assert modes[0] == modes[1]
    tracked = [model.backbone[1].track_running_stats for model in (whole, cut)]
    assert tracked[0] == tracked[1]


def test_st_frozen_a_file_of_a_validation_holds_the_modes_of_training(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, monitor="val_loss", filename="best")
    trainer_for(tmp_path, ExactResume(), best).fit(Evaluates(), data(), data())
    [mine] = read(tmp_path / "best.ckpt")["resume"]
    assert mine["modes"]["evaluates"] in (
        ["backbone.1"],
        ["backbone", "backbone.0", "backbone.1", "backbone.2"],
    )
    assert mine["modes"]["frozen"] == mine["modes"]["untracked"] == []


class Alike(Thaws):
    """Its backbone thaws under ddp: alike on all ranks only if its gradients are averaged."""

    inside = False

    def on_train_epoch_start(self) -> None:
        if not self.inside:
            super().on_train_epoch_start()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.inside and self.global_step == 5:
            self.backbone.requires_grad_(True)


class ThawsAfterValidation(Thaws):
    def on_train_epoch_start(self) -> None:
        pass

    def on_validation_end(self) -> None:
        self.backbone.requires_grad_(True)


class Inside(Alike):
    inside = True


def trained_by_ranks(folder: str) -> Any:
    found = []
    for make in (Alike, FreezesAtEpoch, ThawsAfterValidation, Inside):
        torch.set_num_threads(1)
        model = make()
        model.backbone.pop(2)
        trainer = trainer_for(
            Path(folder), DataParallel(weighted=True, accumulates=False), max_epochs=3,
            strategy=DDPStrategy(process_group_backend="gloo"), devices=2,
            use_distributed_sampler=False, num_sanity_val_steps=0,
        )  # fmt: skip
        rank = trainer.global_rank
        samples = data(8).dataset
        mine = torch.utils.data.Subset(samples, range(rank, len(samples), 2))
        text = ""
        try:
            trainer.fit(model, torch.utils.data.DataLoader(mine, batch_size=8), data())
        except ValueError as error:
            text = str(error)
        mean = {}
        for name, parameter in model.named_parameters():
            both = [torch.empty_like(parameter.data) for _ in range(2)]
            torch.distributed.all_gather(both, parameter.data)
            mean[name] = torch.equal(*both)
        found.append((text, mean))
    return found


def test_st_frozen_ranks_average_what_is_trained_now(tmp_path: Path) -> None:
    found = run_local(
        trained_by_ranks, str(tmp_path), num_processes=2, start_method="forkserver",
        logging_config=None,
    )  # fmt: skip
    for text, alike in found[:3]:
        assert text == ""
        assert all(alike.values()), alike
    assert found[3][0] == (
        "backbone.0.bias of Inside was unfrozen inside epoch 1, and the ranks did not average its "
        "gradients; unfreeze it in on_train_epoch_start, or type strategy=single"
    )
