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

from app.config import check, with_overrides
from app.errors import Refused
from app.launch.local import run_local
from app.matrix import NEEDED, ON_CPU, composed, matrix, presets, refusals
from app.process.ranks import ranks
from app.run.build import build

WAYS = {
    "ddp": (2, ["strategy=ddp"]),
    "fsdp": (2, ["strategy=fsdp", "strategy.shard_min_parameters=4000"]),
    "fsdp_one_block": (2, ["strategy=fsdp", "strategy.shard_min_parameters=null",
                           "strategy.reshard_after_forward=false"]),
    "fsdp_replicas": (4, ["strategy=fsdp", "strategy.shard_min_parameters=4000",
                          "strategy.num_replicas=2"]),
    "tp_fsdp": (2, ["strategy=tp_fsdp", "strategy.shard_min_parameters=4000"]),
    "tp_fsdp_replicas": (4, ["strategy=tp_fsdp", "strategy.shard_min_parameters=4000",
                             "strategy.num_replicas=2"]),
}  # fmt: skip
"""Processes, and what is typed."""
SHORT = [key for key in SMALL if not key.startswith(("model.", "trainer.limit_train"))]
SHORT += [
    "trainer.limit_train_batches=3",
    "optimizer.lr=0.05",
    "callbacks.checkpoint=null",
    "model=transformer",
    "logger=none",
]
EXACT = ("accumulate", "clip", "averaging", "scheduler")
ELSEWHERE = ("compile=", "tuner=", "optimizer=adamw8bit", "precision=fp8")
"""With tests of their own: half a minute to compile, whole searches, packages that are not here."""


def weights_of(config: Any) -> dict[str, Any]:
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
    if preset == "optimizer=muon":  # which makes much of a singular value that is almost none
        return ["optimizer.eps=0.01", "optimizer.ns_dtype=float32"]
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
def on_several(way: str) -> DictConfig:
    num_processes, typed = WAYS[way]
    return composed([*typed, "trainer.accelerator=cpu", f"trainer.devices={num_processes}"])


def several_processes(preset: str, way: str) -> Any:
    """The same run in several processes."""
    cfg = copy.deepcopy(one_process(preset))
    OmegaConf.update(cfg, "strategy", on_several(way).strategy, merge=False)
    num_processes = WAYS[way][0]
    size = num_processes // cfg.strategy.get("tensor_parallel_size", 1)  # which share samples
    changes = {"trainer.devices": num_processes, "data.batch_size": 16 // size}
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
@pytest.mark.parametrize("way", WAYS)
def test_clip_fsdp_avg_sharded_every_technique_comes_to_the_weights_of_one_process(
    way: str,
) -> None:
    num_processes, typed = WAYS[way]
    names = allowed()[typed[0].partition("=")[2]]
    assert len(names) > 20
    together = run_local(
        fit_all,
        {name: several_processes(name, way) for name in names},
        num_processes=num_processes,
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


BOTH = ["averaging.validate=both", "averaging.decay=0.5", "averaging.bn_batches=2"]


@pytest.mark.parametrize("model", ["transformer", "cnn1d_bn"])
def test_st_both_and_bn_batches_on_several_ranks(model: str) -> None:
    """As on one process; the norms, which are of each rank's batch, alike with both strategies."""
    short = [key for key in SHORT if not key.startswith("model=")]
    keys = ["averaging=ema", *BOTH, *short, f"model={model}"]
    several = ["data.batch_size=8", "trainer.devices=2", "trainer.accelerator=cpu"]
    configs = {way: check(composed([*keys, *WAYS[way][1], *several])) for way in ("ddp", "fsdp")}
    found = run_local(
        fit_all, configs, num_processes=2, start_method="forkserver", logging_config=None
    )
    if model == "transformer":
        found["one"] = weights_of(check(composed([*keys, "data.batch_size=16"])))
    expected = found.pop("one", found["ddp"])
    assert expected["metrics"]["raw_val_loss"] != expected["metrics"]["val_loss"]
    for mine in found.values():
        assert mine["metrics"] == pytest.approx(expected["metrics"], abs=1e-3)
        for name, tensor in expected["weights"].items():
            torch.testing.assert_close(mine["weights"][name], tensor, rtol=0, atol=1e-4)


GPU = "trainer.accelerator=gpu"
REFUSED = {
    (
        "strategy=deepspeed_zero2",
        "trainer.accelerator=cpu",
    ): "trainer.accelerator=cpu cannot run with "
    "strategy=deepspeed: DeepSpeed needs GPUs; use strategy=fsdp",
    ("strategy=fsdp", "precision=fp8", GPU): "precision.mode=transformer-engine cannot run with "
    "strategy=fsdp: float8 layers are not sharded; use precision=bf16",
    ("strategy=tp_fsdp", "precision=fp16", "trainer.devices=2", GPU): "precision.mode=16-mixed "
    "cannot run with strategy=fsdp: an overflow in one part of a split layer is not seen by the "
    "others; use precision=bf16, or type strategy.tensor_parallel_size=1",
    ("strategy=deepspeed_zero2", "precision=fp64", GPU): "precision.mode=64-true cannot run with "
    "strategy=deepspeed: Lightning's strategy takes neither float64 nor float8; use "
    "precision=bf16",
    ("strategy=deepspeed_zero1", "clip=value", GPU): "this clipping cannot run with "
    "strategy=deepspeed: DeepSpeed's engine keeps the gradients, and clips their 2-norm only; use "
    "clip=norm",
    (
        "strategy=deepspeed_zero1",
        "callbacks.checkpoint.keep_every_n_steps=9",
        GPU,
    ): "callbacks.checkpoint.keep_every_n_steps cannot run with strategy=deepspeed: its "
    "checkpoints are folders; type callbacks.checkpoint.keep_every_n_steps=null",
    ("strategy=deepspeed_zero1", "accumulate=constant", GPU): "accumulation cannot run with "
    "strategy=deepspeed: DeepSpeed's engine counts the micro-batches itself; use accumulate=none, "
    "or strategy=fsdp",
    ("strategy=deepspeed_zero3", "averaging=ema", GPU): "averaging cannot run with "
    "strategy=deepspeed: DeepSpeed's engine keeps the weights that it steps; use averaging=none, "
    "or strategy=fsdp",
    (
        "strategy=fsdp",
        "tuner=milestones",
        "tuner.milestones=[1]",
    ): "tuner.milestones cannot run with "
    "strategy=fsdp: a second sharded model cannot be made inside a fit; type "
    "'tuner.milestones=[]'",
    (
        "strategy=ddp",
        "tuner=full",
        "tuner.milestones=[1]",
    ): "tuner.milestones with tuner.batch_size "
    "cannot run with strategy=ddp: a rank that runs out of memory inside a fit would leave the "
    "others waiting; type tuner.batch_size=null",
    (
        "strategy=fsdp",
        "compile=default",
        "compile.fullgraph=true",
    ): "compile.fullgraph=true cannot "
    "run with strategy=fsdp: each block is gathered between two graphs; type "
    "compile.fullgraph=false",
    ("strategy=deepspeed_zero2", "optimizer=muon", GPU): "optimizer=muon cannot run with "
    "strategy=deepspeed: DeepSpeed's engine steps flat parts of the parameters, of which no matrix "
    "is whole; use optimizer=adamw, or strategy=fsdp",
    (
        "strategy=fsdp",
        "optimizer=adamw8bit",
    ): "optimizer=adamw8bit cannot run with strategy=fsdp: "
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
    assert {
        "single",
        "ddp",
        "fsdp",
        "tp_fsdp",
        "ddp_find_unused",
        "deepspeed_zero3_offload",
    } <= strategies


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


def interrupted_and_whole(config: Any) -> list[Any]:
    """The weights of a run that is cut in its second epoch and continued, and of a whole one."""
    torch.set_num_threads(1)
    found = []
    for folder in ("whole", "cut"):
        run_dir = f"{config.run_dir}/{folder}"
        checkpoint = {**config.plain["callbacks"]["checkpoint"], "dirpath": run_dir}
        here = config.but(run_dir=run_dir, callbacks={"checkpoint": checkpoint})
        last = None
        if folder == "cut":
            last = f"{run_dir}/last.ckpt"
            saves_here = config.accumulate is not None  # inside a window
            run = build(here, [CutAt(7, last if saves_here else None)])
            with pytest.raises(InterruptedError):
                run.trainer.fit(run.model, datamodule=run.data)
        run = build(here, [])
        run.trainer.fit(run.model, datamodule=run.data, ckpt_path=last)
        ranks().gathered(0)  # the file is written by the first rank
        found.append(torch.load(f"{run_dir}/last.ckpt", weights_only=True))
    return [{"average": whole["state_dict"], "raw": whole["raw"]["state_dict"],
             "kept": whole["averages"]["average"]} for whole in found]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "chosen",
    [
        (way, accumulate)
        for way in ("ddp", "fsdp", "fsdp_replicas")
        for accumulate in ("accumulate=none", "accumulate=constant")
    ],
    ids=",".join,
)
def test_several_ranks_continue_bit_for_bit_with_dropout_and_augmentations(
    checked: Callable[..., Any], chosen: tuple[str, str]
) -> None:
    way, accumulate = chosen
    num_processes, typed = WAYS[way]
    config = (
        checked(
            "model=custom", "model._target_=theirs.LitModel", "data=custom", "optimizer=adamw",
            "data._target_=theirs.LitData", "+data.num_samples=43", "trainer.max_epochs=3",
            "averaging=ema", "averaging.decay=0.9", "logger=none", "callbacks.progress=null",
            "trainer.accelerator=cpu",
            "callbacks.checkpoint.every_n_steps=1", f"trainer.devices={num_processes}",
            accumulate, *typed,
            *(["strategy.shard_min_parameters=null"] if way != "ddp" else []),
        )
    )  # fmt: skip
    whole, cut = run_local(
        interrupted_and_whole,
        config,
        num_processes=num_processes,
        start_method="forkserver",
        logging_config=None,
    )
    for part in whole:
        for name, tensor in whole[part].items():
            assert torch.equal(tensor, cut[part][name]), (part, name)
