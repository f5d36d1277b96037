"""Models of other people, sharded: weights, metrics and checkpoints as of strategy=ddp."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from app.errors import Refused
from app.launch.local import run_local
from app.process.ranks import ranks
from app.run.build import build

TRAINED = ("TiedLanguageModel", "Encoder", "Residual", "ConvNet", "FineTuned", "Buffers", "Siamese",
           "OwnParameters", "InPlace", "Recurrent", "OneLayer", "ShardsItself")  # fmt: skip
LAYOUTS = {
    "blocks": (2, ["strategy.shard_min_parameters=50"]),
    "one block": (2, ["strategy.shard_min_parameters=null"]),
    "replicas": (4, ["strategy.shard_min_parameters=50", "strategy.num_replicas=2"]),
}
"""Processes, and what is typed."""


@pytest.fixture
def configured(checked: Callable[..., Any]) -> Callable[..., Any]:
    """A short run of one of the models on several processes."""

    def configured_(model: str, num_processes: int, *typed: str) -> Any:
        return checked(
            "model=custom", f"model._target_=shardable.{model}", "data=custom", "optimizer=none",
            "data._target_=shardable.Data", f"+data.batch_size={8 // num_processes}",
            "logger=none", "callbacks=none", "trainer.accelerator=cpu", "trainer.max_epochs=2",
            f"trainer.devices={num_processes}", *typed,
        )  # fmt: skip

    return configured_


def on_ranks(work: Callable[..., Any], num_processes: int, *arguments: Any) -> Any:
    return run_local(
        work,
        *arguments,
        num_processes=num_processes,
        start_method="forkserver",
        logging_config=None,
    )


def fitted(config: Any, path: str, begin_at: str | None = None) -> dict[str, Any]:
    """Fit, save and read the checkpoint; what was measured is in it."""
    torch.set_num_threads(1)
    run = build(config, [])
    run.trainer.fit(run.model, datamodule=run.data, ckpt_path=begin_at)
    run.trainer.save_checkpoint(path)
    ranks().gathered(0)  # the file is written by the first rank
    found = torch.load(path, weights_only=True)
    return {
        "weights": found["state_dict"],
        "optimizers": found["optimizer_states"],
        "metrics": {name: float(v) for name, v in run.trainer.callback_metrics.items()},
    }


def fitted_all(pairs: dict[str, dict[str, Any]], folder: str) -> dict[str, dict[str, Any]]:
    """Both strategies from the beginning, and each from where the other had come to by half."""
    return {model: fitted_both(configs, f"{folder}/{model}") for model, configs in pairs.items()}


def fitted_both(configs: dict[str, Any], folder: str) -> dict[str, Any]:
    found = {}
    for name, config in configs.items():
        found[name] = fitted(config, f"{folder}/{name}.ckpt")
        half = config.but(trainer={**config.plain["trainer"], "max_epochs": 1})
        fitted(half, f"{folder}/half-{name}.ckpt")
    for name, other in (("ddp", "fsdp"), ("fsdp", "ddp")):
        begin_at = f"{folder}/half-{other}.ckpt"
        found[f"{name} after {other}"] = fitted(configs[name], f"{folder}/x.ckpt", begin_at)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sharded_model_is_trained_saved_and_continued_as_a_copied_one(
    configured: Callable[..., Any], tmp_path: Any, layout: str
) -> None:
    num_processes, typed = LAYOUTS[layout]
    pairs = {}
    for model in TRAINED:
        if model == "ShardsItself" and layout == "replicas":  # is refused
            continue
        unused = ["strategy.find_unused_parameters=true"] if model == "OwnParameters" else []
        pairs[model] = {
            "ddp": configured(model, num_processes, "strategy=ddp", *unused),
            "fsdp": configured(model, num_processes, "strategy=fsdp", *typed),
        }
    found = on_ranks(fitted_all, num_processes, pairs, str(tmp_path))
    expected = {model: dict.fromkeys(ways, ways["ddp"]) for model, ways in found.items()}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def sums_of_weights(config: Any) -> list[float]:
    """What each rank's weights come to after a fit."""
    torch.set_num_threads(1)
    run = build(config, [])
    run.trainer.fit(run.model, datamodule=run.data)
    whole = [parameter.full_tensor() for parameter in run.model.parameters()]
    return ranks().gathered(float(sum(tensor.double().abs().sum() for tensor in whole)))


@pytest.mark.slow
def test_all_replicas_begin_with_the_weights_of_the_first_process(
    configured: Callable[..., Any],
) -> None:
    num_processes, typed = LAYOUTS["replicas"]
    config = configured("DrawnAnew", num_processes, "strategy=fsdp", *typed)
    sums = on_ranks(sums_of_weights, num_processes, config)
    assert len(sums) == num_processes
    assert len(set(sums)) == 1


REFUSED = {
    ("TwoOptimizers", "strategy=fsdp"): "strategy=fsdp cannot shard TwoOptimizers, which steps its "
    "own optimizers (automatic_optimization=False); give it a configure_model, or use "
    "strategy=ddp",
    ("Stale", "strategy=fsdp"): "strategy=fsdp needs optimizers of the sharded parameters, and "
    "this model kept some from before; take them from self.parameters() in configure_optimizers, "
    "or use strategy=ddp",
    ("Autoencoder", "strategy=fsdp", "strategy.shard_min_parameters=400"): "strategy=fsdp gathers "
    "a block while its forward runs, and no other method: call the block, or type "
    "strategy.shard_min_parameters=null",
    ("ShardsItself", "strategy=fsdp", "strategy.num_replicas=2"): "strategy.num_replicas=2 cannot "
    "act on ShardsItself, which shards itself; type strategy.num_replicas=1, or shard it over "
    "self.device_mesh['replicate', 'data_parallel']",
    (
        "Residual",
        "strategy=tp_fsdp",
        "strategy.colwise=[blocks.*.parts.up]",
        "strategy.rowwise=[blocks.*.down]",
    ): "strategy.tensor_parallel_size must divide the 39 numbers by which blocks.0.parts.up is "
    "split, got 2; leave it out of strategy.colwise",
    ("Residual", "strategy=tp_fsdp"): "strategy.colwise must match names of linear layers, got "
    "*.linear1; Residual has inner, blocks.0.parts.up, blocks.0.down, blocks.1.parts.up, "
    "blocks.1.down, blocks.2.parts.up, blocks.2.down, head",
    ("Residual", "strategy=fsdp", "strategy.shard_classes=[Layer]"): "strategy.shard_classes must "
    "name classes of modules in Residual, got Layer; it has 8 Linear, 3 LayerNorm, 3 Block: type "
    "for example 'strategy.shard_classes=[Linear]'",
}


def failures(configs: dict[tuple[str, ...], Any]) -> dict[tuple[str, ...], str]:
    found = {}
    for chosen, config in configs.items():
        run = build(config, [])
        with pytest.raises((Refused, RuntimeError)) as error:
            run.trainer.fit(run.model, datamodule=run.data)
        found[chosen] = str(error.value)
    return found


@pytest.mark.slow
def test_a_model_that_cannot_be_sharded_is_refused_with_what_to_type(
    configured: Callable[..., Any],
) -> None:
    configs = {chosen: configured(chosen[0], 2, *chosen[1:]) for chosen in REFUSED}
    said = on_ranks(failures, 2, configs)
    assert {chosen: text for chosen, text in said.items() if REFUSED[chosen] not in text} == {}
