"""Every technique on every strategy that a CPU runs: the run of one process, or refused with why.

DeepSpeed needs GPUs: of it the refusals are tested. Of fsdp what is left out is the movement of
shards between CPU and GPU.
"""

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import SMALL
from omegaconf import DictConfig, OmegaConf

from app.config import check
from app.errors import Refused
from app.launch.local import run_local
from app.matrix import NEEDED, ON_CPU, composed, matrix, presets, refusals
from app.process.ranks import ranks
from app.run.build import build
from app.tuner.keys import with_overrides

STRATEGIES = ("ddp", "fsdp", "fsdp2", "tp_fsdp2")
SHORT = [key for key in SMALL if not key.startswith(("model.", "trainer.limit_train"))]
SHORT += [
    "trainer.limit_train_batches=3",
    "optimizer.lr=0.05",
    "callbacks.checkpoint=null",
    "model=transformer",
    "logger=none",
]
SHARDS = {"fsdp": 4000, "fsdp2": None, "tp_fsdp2": 4000}
EXACT = ("accumulate", "clip", "averaging", "scheduler")
ELSEWHERE = ("compile=", "tuner=", "optimizer=adamw8bit", "precision=fp8")
"""With tests of their own: half a minute to compile, whole searches, packages that are not here."""


def weights_of(config: dict[str, Any]) -> dict[str, Any]:
    """Fit, and gather what a checkpoint would hold: whole weights, on rank 0."""
    run = build(config, [])
    run.trainer.fit(run.model, datamodule=run.data)
    weights = run.trainer.strategy.lightning_module_state_dict()
    return {
        "weights": {name: tensor.cpu() for name, tensor in weights.items()},
        "steps": run.trainer.global_step,
        "metrics": {name: float(v) for name, v in run.trainer.callback_metrics.items()},
    }


def fit_all(configs: dict[str, Any]) -> dict[str, Any]:
    """Fit one configuration after another; what each came to, or its error."""
    torch.set_num_threads(1)
    return {name: weights_of(config) for name, config in configs.items()}


def needed(preset: str) -> list[str]:
    """What a preset takes to act in a run of six steps, and to be compared with another."""
    if preset == "accumulate=effective":
        return ["accumulate.batch_size=48"]
    if preset.startswith("optimizer=adam"):
        return ["optimizer.eps=0.01"]  # or a gradient of 1e-9 steps by the whole rate
    if preset == "averaging=swa":
        return ["averaging.bn_batches=null", "averaging.anneal_epochs=1"]
    return NEEDED.get(preset, [])


@cache
def one_process(preset: str) -> DictConfig:
    return composed([preset, *SHORT, *needed(preset), "data.batch_size=16"])


@cache
def alone(preset: str) -> dict[str, Any]:
    """What one process comes to."""
    return weights_of(check(one_process(preset)))


@cache
def on_two(strategy: str) -> DictConfig:
    return composed([f"strategy={strategy}", "trainer.accelerator=cpu"])


def two_processes(preset: str, strategy: str) -> dict[str, Any]:
    """The same run in two processes."""
    cfg = copy.deepcopy(one_process(preset))
    OmegaConf.update(cfg, "strategy", on_two(strategy).strategy, merge=False)
    changes = {"trainer.devices": 2}
    if strategy in SHARDS:
        changes["strategy.shard_min_parameters"] = SHARDS[strategy]
    if strategy != "tp_fsdp2":  # of which both ranks take the same samples
        changes["data.batch_size"] = 8
    return check(with_overrides(cfg, changes))


@cache
def cells() -> list[tuple[str, str, str | None]]:
    return list(refusals(ON_CPU))


@cache
def allowed() -> dict[str, list[str]]:
    """The presets that each strategy runs on a CPU."""
    found: dict[str, list[str]] = {}
    for preset, strategy, reason in cells():
        if reason is None and not preset.startswith(ELSEWHERE):
            found.setdefault(strategy, []).append(preset)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_clip_fsdp_avg_sharded_every_technique_comes_to_the_weights_of_one_process(
    strategy: str,
) -> None:
    names = allowed()[strategy]
    assert len(names) > 20
    together = run_local(
        fit_all,
        {name: two_processes(name, strategy) for name in names},
        num_processes=2,
        start_method="forkserver",
        logging_config=None,
    )
    far = {}
    for name in names:
        assert together[name]["steps"] == alone(name)["steps"] > 0, name
        mine, theirs = alone(name)["weights"], together[name]["weights"]
        assert mine.keys() == theirs.keys(), name
        if name.startswith(EXACT):
            measured = together[name]["metrics"]
            assert alone(name)["metrics"] == pytest.approx(measured, abs=1e-4), name
        tolerance = 1e-6 if name.startswith(EXACT) else 1e-5
        if name.startswith("precision=bf16"):
            tolerance = 0.05
        distance = max(float((mine[k].float() - theirs[k].float()).abs().max()) for k in mine)
        if not distance <= tolerance:
            far[name] = distance
    assert far == {}


GPU = "trainer.accelerator=gpu"
REFUSED = {
    (
        "strategy=deepspeed_zero2",
        "trainer.accelerator=cpu",
    ): "trainer.accelerator=cpu cannot run with "
    "strategy=deepspeed: DeepSpeed needs GPUs; use strategy=fsdp2",
    ("strategy=fsdp2", "precision=fp64"): "precision.mode=64-true cannot run with strategy=fsdp2: "
    "fsdp2 shards float32 and bfloat16 weights, without a scaled loss; use precision=bf16",
    ("strategy=fsdp", "precision=fp64"): "precision.mode=64-true cannot run with strategy=fsdp: "
    "Lightning's strategy takes neither float64 nor float8; use precision=bf16",
    ("strategy=fsdp", "clip=adaptive"): "clip=adaptive cannot run with strategy=fsdp: its flat "
    "shards cut through the units whose norms are compared; use strategy=fsdp2, or clip=norm",
    ("strategy=deepspeed_zero1", "clip=value", GPU): "this clipping cannot run with "
    "strategy=deepspeed: DeepSpeed's engine keeps the gradients, and clips their 2-norm only; use "
    "clip=norm",
    ("strategy=deepspeed_zero1", "accumulate=constant", GPU): "accumulation cannot run with "
    "strategy=deepspeed: DeepSpeed's engine counts the micro-batches itself; use accumulate=none, "
    "or strategy=fsdp2",
    ("strategy=deepspeed_zero3", "averaging=ema", GPU): "averaging cannot run with "
    "strategy=deepspeed: DeepSpeed's engine keeps the weights that it steps; use averaging=none, "
    "or strategy=fsdp2",
    ("strategy=fsdp", "averaging=ema", "precision=bf16_true"): "averaging with precision=bf16_true "
    "cannot run with strategy=fsdp: the float32 average of flat shards cannot be kept in a "
    "checkpoint; use strategy=fsdp2, or precision=bf16",
    (
        "strategy=fsdp2",
        "averaging=ema",
        "averaging.validate=both",
    ): "averaging.validate=both cannot "
    "run with strategy=fsdp2: it runs a copy of the model, which cannot be made of shards; type "
    "averaging.validate=averaged",
    (
        "strategy=fsdp2",
        "tuner=milestones",
        "tuner.milestones=[1]",
    ): "tuner.milestones cannot run with "
    "strategy=fsdp2: a second sharded model cannot be made inside a fit; type "
    "'tuner.milestones=[]'",
    (
        "strategy=ddp",
        "tuner=full",
        "tuner.milestones=[1]",
    ): "tuner.milestones with tuner.batch_size "
    "cannot run with strategy=ddp: a rank that runs out of memory inside a fit would leave the "
    "others waiting; type tuner.batch_size=null",
    (
        "strategy=fsdp2",
        "compile=default",
        "compile.fullgraph=true",
    ): "compile.fullgraph=true cannot "
    "run with strategy=fsdp2: each block is gathered between two graphs; type "
    "compile.fullgraph=false",
    (
        "strategy=fsdp2",
        "optimizer=adamw8bit",
    ): "optimizer=adamw8bit cannot run with strategy=fsdp2: "
    "bitsandbytes cannot step shards; use optimizer=adamw, or strategy=ddp",
}


@pytest.mark.parametrize("chosen", REFUSED, ids=" ".join)
def test_a_pair_that_cannot_run_is_refused_with_the_reason(
    checked: Callable[..., Any], chosen: tuple[str, ...]
) -> None:
    with pytest.raises(Refused) as refusal:
        checked(*chosen)
    assert str(refusal.value) == REFUSED[chosen]


def test_every_refused_pair_is_shown_above() -> None:
    from app.conf.combinations import WITH_STRATEGIES

    assert len(REFUSED) == len(WITH_STRATEGIES)


def test_every_preset_is_in_the_matrix_with_every_strategy() -> None:
    strategies = {strategy for _, strategy, _ in cells()}
    assert len(cells()) == len(strategies) * len(presets())
    assert {"single", *STRATEGIES, "ddp_find_unused", "deepspeed_zero3_offload"} <= strategies


def test_the_readme_holds_the_matrix_as_it_is_printed() -> None:
    assert matrix() in (Path(__file__).parents[1] / "README.md").read_text()


# --------------------------------------------------------------------- checkpoints of several ranks


class CutAt(pl.Callback):
    """Ends a run on every rank when a batch begins; saves behind the one before, if asked to."""

    def __init__(self, batch: int, path: str | None) -> None:
        self.batch = batch
        self.path = path

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.fit_loop.total_batch_idx == self.batch:
            raise InterruptedError

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.fit_loop.total_batch_idx == self.batch - 1 and self.path is not None:
            trainer.save_checkpoint(self.path)


def interrupted_and_whole(config: dict[str, Any]) -> list[Any]:
    """The weights of a run that is cut in its second epoch and continued, and of a whole one."""
    torch.set_num_threads(1)
    found = []
    for folder in ("whole", "cut"):
        here = {**config, "run_dir": f"{config['run_dir']}/{folder}"}
        checkpoint = {**config["callbacks"]["checkpoint"], "dirpath": here["run_dir"]}
        here["callbacks"] = {"checkpoint": checkpoint}
        last = None
        if folder == "cut":
            last = f"{here['run_dir']}/last.ckpt"
            saves_here = config["accumulate"] is not None  # inside a window
            run = build(here, [CutAt(7, last if saves_here else None)])
            with pytest.raises(InterruptedError):
                run.trainer.fit(run.model, datamodule=run.data)
        run = build(here, [])
        run.trainer.fit(run.model, datamodule=run.data, ckpt_path=last)
        ranks().gathered(0)  # the file is written by the first rank
        found.append(torch.load(f"{here['run_dir']}/last.ckpt", weights_only=True))
    return [{part: whole[part] for part in whole if "weights" in part or part == "state_dict"}
            for whole in found]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "chosen",
    [
        ("ddp", "accumulate=none"),
        ("fsdp", "accumulate=none"),
        ("fsdp2", "accumulate=none"),
        ("ddp", "accumulate=constant"),
        ("fsdp2", "accumulate=constant"),
    ],
    ids=",".join,
)
def test_several_ranks_continue_bit_for_bit_with_dropout_and_augmentations(
    checked: Callable[..., Any], chosen: tuple[str, str]
) -> None:
    strategy, accumulate = chosen
    config = (
        checked(
            "model=custom", "model._target_=theirs.LitModel", "data=custom", "optimizer=adamw",
            "data._target_=theirs.LitData", "+data.num_samples=43", "trainer.max_epochs=3",
            "averaging=ema", "averaging.decay=0.9", "logger=none", "callbacks.progress=null",
            "trainer.accelerator=cpu",
            "callbacks.checkpoint.every_n_steps=1", f"strategy={strategy}", "trainer.devices=2",
            accumulate,
            *(["strategy.shard_min_parameters=null"] if strategy != "ddp" else []),
        )
    )  # fmt: skip
    whole, cut = run_local(
        interrupted_and_whole,
        config,
        num_processes=2,
        start_method="forkserver",
        logging_config=None,
    )
    assert whole.keys() == cut.keys() >= {"state_dict", "raw_weights"}
    for part in whole:
        for name, tensor in whole[part].items():
            assert torch.equal(tensor, cut[part][name]), (part, name)
