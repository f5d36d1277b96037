"""Everything that can be known before torch is imported is refused before torch is imported."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app import conf
from app.cli.explained import REFUSALS, explain
from app.errors import Refused
from app.run.build import build

AVERAGES = "|".join(
    sorted({p.stem for p in (Path(conf.__file__).parent / "averaging").glob("*.yaml")} - {"none"})
)
KEYS = {
    ("clip.maxnorm=1",): "clip.maxnorm is not a key; did you mean clip.max_norm?",
    ("clipp=norm",): "clipp is not a key; did you mean clip?",
    (
        "clip=nrm",
    ): "clip=nrm is not a preset; choose one of adaptive, custom, none, norm, percentile, "
    "value; did you mean clip=norm?",
    ("clip.max_norm=much",): "clip.max_norm: value 'much' of type 'str' could not be converted to "
    "Float",
    ("clip.max_norm=-1",): "clip.max_norm must be > 0, got -1.0; to switch clipping off use "
    "clip=none",
    ("clip.nonfinite=ignore",): "clip.nonfinite: invalid value 'ignore', expected one of [skip, "
    "error, clip]",
    ("averaging.decay=0.9",): "averaging.decay has no effect: averaging is off; choose "
    f"averaging={AVERAGES} as well",
    ("averaging=none", "++averaging.decay=0.9"): "averaging.decay has no effect: averaging is off; "
    f"choose averaging={AVERAGES} as well",
    ("model=custom",): "model._target_ is required; type model._target_=VALUE",
    ("clip=custom", "clip._target_=theirs.Rule", "clip.maxnorm=1"): (
        "clip.maxnorm is not a key; known are clip._target_, clip.nonfinite; what its class takes "
        "has a plus before it: +clip.maxnorm=VALUE"
    ),
    ("+seeed=1",): "seeed is not a key; did you mean seed?",
    ("+clip.maxnorm=1",): "clip.maxnorm is not a key; did you mean clip.max_norm?",
    ("+model.zzz=1",): "model.zzz is not a key; known are model.batch_norm, model.channels, "
    "model.in_features, model.kernel_sizes, model.num_classes, model.padding, model.stride",
    ("+callbacks.mine=3",): "callbacks.mine needs a class; type "
    "+callbacks.mine._target_=package.module.Class",
    ("optimizer._partial_=false",): "optimizer._partial_ must be True, got False: it says how the "
    "class is built; leave it out",
    ("clip._target_=math",): "clip._target_ must be package.module.Class, got 'math'; type "
    "clip._target_=package.module.Class",
    ("~seed",): "seed is read, and ~seed takes it away; type seed=VALUE instead",
    ("seed=4294967296",): "seed must be <= 4294967295, got 4294967296; type seed=42",
    ("optimizer.lr=inf",): "optimizer.lr must be <= 1e+38, got inf; type for example "
    "optimizer.lr=0.01",
    ("optimizer.lr=nan",): "optimizer.lr must be > 0, got nan; type for example optimizer.lr=0.01",
    ("model=custom", "model._target_=theirs.LitModel", "+model.lr=nan"): "model.lr must be a "
    "number, got nan; leave it out, or type a number",
    ("averaging=swa", "averaging.lr=[0.1,nan]"): "averaging.lr must be > 0, or a list of such "
    "numbers, got [0.1, nan]; for a share of the run's rate type averaging.lr=null "
    "averaging.lr_factor=0.5",
    ("averaging=ema", "averaging.start_epoch=-1"): "averaging.start_epoch must be >= 0, got -1; "
    "for no bound type averaging.start_epoch=null",
    ("trainer.max_minutes=inf",): "trainer.max_minutes must be <= 5270400, got inf; for no limit "
    "type trainer.max_minutes=null",
    ("trainer.limit_train_batches=0",): "trainer.limit_train_batches must leave a batch to train "
    "on, got 0; for all batches type trainer.limit_train_batches=null",
    ("trainer.check_val_every_n_epoch=null",): "trainer.val_check_interval must be a count of "
    "micro-batches where trainer.check_val_every_n_epoch is null, got 1.0; type "
    "trainer.val_check_interval=100, or trainer.check_val_every_n_epoch=1",
    ("callbacks.checkpoint.dirpath=",): "callbacks.checkpoint.dirpath must not be empty, got ''; "
    "type 'callbacks.checkpoint.dirpath=${run_dir}/checkpoints'",
    ("tuned=",): "tuned must not be empty, got ''; type tuned=runs/NAME/tuned.yaml, or tuned=null",
    ("name=",): "name must not be empty, got ''; type name=mine",
    ("name=a/../../b",): "name must be that of a folder, which no dot begins, got a/../../b; type "
    "name=mine",
    ("name=.tuned",): "name must be that of a folder, which no dot begins, got .tuned; type "
    "name=mine",
    ("name='a\tb'",): "name must hold no control characters, got 'a\\tb'; type name=mine",
    (f"name={'x' * 201}",): f"name must be at most 200 bytes long, got {'x' * 201}; type name=mine",
    ("data=custom", "data._target_=theirs.LitData"): "model.in_features: interpolation key "
    "'data.num_features' not found; type model.in_features=VALUE",
    ("fit=false",): "fit must be true where tuner is off, got False; use tuner=full",
    ("seed=-1",): "seed must be >= 0, got -1; type seed=42",
    ("trainer.max_epochs=0",): "trainer.max_epochs must be > 0, got 0; for no limit type "
    "trainer.max_epochs=null",
    ("accumulate=effective", "accumulate.batch_size=1000"): "accumulate.batch_size must be a "
    "multiple of 128 (micro-batch 128 x world size 1), got 1000; the nearest that work: "
    "accumulate.batch_size=896 or accumulate.batch_size=1024",
    (
        "accumulate=effective",
        "accumulate.batch_size=128",
        "strategy=ddp",
        "trainer.devices=3",
    ): "accumulate.batch_size must be a multiple of 384 (micro-batch 128 x world size 3), got 128; "
    "the nearest that work: accumulate.batch_size=384",
    ("trainer.min_epochs=31",): "trainer.min_epochs must be <= trainer.max_epochs, 30, got 31; "
    "type trainer.min_epochs=null",
    ("trainer.deterministic=maybe",): "trainer.deterministic must be true, false or warn, got "
    "maybe; type trainer.deterministic=true",
    ("trainer.overfit_batches=0",): "trainer.overfit_batches must leave a batch to train on, got "
    "0; to train on all type trainer.overfit_batches=null",
    ("trainer.overfit_batches=3", "trainer.limit_train_batches=2"): "trainer.limit_train_batches=2 "
    "has no effect: trainer.overfit_batches is the limit; type trainer.limit_train_batches=null",
    ("trainer.reload_dataloaders_every_n_epochs=2",): "trainer.reload_dataloaders_every_n_epochs "
    "must be <= 1, got 2; what is made less often cannot be made again in a continued run; type "
    "trainer.reload_dataloaders_every_n_epochs=1, and keep in the model or the data what is to "
    "stay",
    ("+trainer.plugins.mine=3",): "trainer.plugins.mine needs a class; type "
    "+trainer.plugins.mine._target_=package.Plugin",
    ("trainer.gradient_clip_val=1",): "trainer.gradient_clip_val is replaced here by something "
    "else; type clip=norm clip.max_norm=1.0",
    ("+trainer.fast_dev_run=true",): "trainer.fast_dev_run is replaced here by something else; "
    "type debug=fast",
    ("callbacks.checkpoint.filename=best",): "callbacks.checkpoint.filename must be the name of a "
    "file beside best.ckpt, got best; type 'callbacks.checkpoint.filename=\"epoch={epoch}-"
    "{val_loss:.3f}\"'",
    ("callbacks.checkpoint.filename='{val_loss:d}'",): "callbacks.checkpoint.filename must have "
    "formats of numbers, got {val_loss:d}: Unknown format code 'd' for object of type 'float'; "
    "type 'callbacks.checkpoint.filename=\"epoch={epoch}-{val_loss:.3f}\"'",
    ("callbacks.checkpoint.top_k=3", "callbacks.checkpoint.monitor=null"): "callbacks.checkpoint."
    "top_k has no effect: callbacks.checkpoint.monitor is null, which keeps no best one; type "
    "callbacks.checkpoint.monitor=val_loss",
    ("trainer.devices=some",): "trainer.devices must be >= 1, up to 1024, or auto, got some; type "
    "trainer.devices=2 strategy=ddp",
}
COMBINATIONS = {
    ("scheduler=custom", "scheduler._target_=torch.optim.lr_scheduler.OneCycleLR", "tuner=lr_find",
     "+scheduler.max_lr=1", "+scheduler.total_steps=total_steps"): "tuner.lr searches "
    "optimizer.lr, in place of which torch.optim.lr_scheduler.OneCycleLR sets its max_lr; use "
    "scheduler=onecycle, or tuner=batch_size",
    ("model=custom", "model._target_=theirs.LitModel", "data=none", "sharing=mmap"): "sharing "
    "shares what a LightningDataModule sets up, and data=none has none; use sharing=none",
    ("scheduler=cosine", "optimizer=none"): "scheduler needs an optimizer whose rate it sets, and "
    "optimizer=none leaves the model its own; choose an optimizer, or use scheduler=none",
    ("scheduler=cosine", "trainer.max_epochs=null", "trainer.max_minutes=1"): "scheduler needs the "
    "length of the run; type trainer.max_epochs=30 or trainer.max_steps=1000, or use "
    "scheduler=none",
    ("scheduler=steps", "trainer.max_epochs=20"): "scheduler.milestones=[15, 25] are not all "
    "before trainer.max_epochs=20; type 'scheduler.milestones=[10]'",
    ("scheduler=plateau", "trainer.limit_val_batches=0"): "scheduler=plateau watches the "
    "validation, which trainer.limit_val_batches=0 switches off; type "
    "trainer.limit_val_batches=null, or use another scheduler",
    ("callbacks=early_stopping", "trainer.limit_val_batches=0"): "callbacks.early_stopping watches "
    "the validation, which trainer.limit_val_batches=0 switches off; type "
    "trainer.limit_val_batches=null, or use callbacks=default",
    ("callbacks.checkpoint.top_k=3", "trainer.limit_val_batches=0"): "callbacks.checkpoint.top_k "
    "keeps the best of a validation, which trainer.limit_val_batches=0 switches off; type "
    "trainer.limit_val_batches=null, or callbacks.checkpoint.monitor=train_loss",
    ("accumulate=schedule", "trainer.max_epochs=15"): "accumulate.starts has [20], which the run "
    "never reaches (trainer.max_epochs=15); leave them out",
    ("averaging=swa", "averaging.start=30"): "averaging.start=30 is not before the end of the run "
    "(30), so that nothing would be averaged; type averaging.start=15, or use averaging=none",
    ("averaging=swa", "trainer.max_epochs=null", "trainer.max_steps=9"): "averaging.start=0.5 is a "
    "share of trainer.max_epochs, which is null; type averaging.start=null "
    "averaging.start_step=1000",
    ("averaging=ema", "trainer.max_epochs=null", "trainer.max_minutes=1"): "averaging.horizon is a "
    "share of the run's optimizer steps, which neither trainer.max_epochs nor trainer.max_steps "
    "bounds; type averaging.decay=0.999",
    ("averaging=ema", "averaging.validate=both", "trainer.limit_val_batches=0"): "averaging."
    "validate=both needs the validation, which trainer.limit_val_batches=0 switches off; type "
    "averaging.validate=averaged",
    ("precision=fp16", "trainer.accelerator=cpu"): "precision=fp16 needs a GPU: "
    "trainer.accelerator=cpu has no scaled float16; use precision=bf16",
    ("model=graphsage",): "model=graphsage has 2 layers, and the data serves 0 hops to neighbours; "
    "type data=graph 'data.fanouts=[10, 10]'",
    ("data=graph",): "data.fanouts=[10, 10] adds neighbours to each node, which only "
    "model=graphsage takes; choose it, or type 'data.fanouts=[]'",
    ("trainer.devices=2",): "trainer.devices=2 and trainer.num_nodes=1 need a strategy of several "
    "processes; type strategy=ddp",
    ("strategy=tp_fsdp", "trainer.devices=3"): "strategy.tensor_parallel_size=2 must divide the 3 "
    "processes; type trainer.devices=2",
    ("strategy=fsdp", "trainer.devices=6", "strategy.num_replicas=4"): "strategy.num_replicas=4 "
    "must divide the number of data parallel processes, 6; type strategy.num_replicas=2",
    ("strategy=ddp", "trainer.sync_batchnorm=true", "trainer.accelerator=cpu"):
    "trainer.sync_batchnorm needs GPUs: trainer.accelerator=cpu has no synchronized BatchNorm; "
    "type trainer.sync_batchnorm=false",
    ("trainer.sync_batchnorm=true",): "trainer.sync_batchnorm has no effect with strategy=single; "
    "type strategy=ddp, or trainer.sync_batchnorm=false",
    ("model.in_features=39",): "model.in_features must be the data's 40, got 39; leave it out",
    ("model.num_classes=3",): "model.num_classes must be at least the data's 10, got 3; leave it "
    "out",
    ("callbacks.checkpoint.monitor=zzz",): "callbacks.checkpoint.monitor must be one of "
    "train_loss, val_loss, val_acc, test_loss, test_acc, raw_val_loss, raw_val_acc, which the "
    "model logs, got zzz; type callbacks.checkpoint.monitor=val_loss",
    ("callbacks.checkpoint.monitor=zzz", "model=custom", "model._target_=theirs.LitModel"):
    "callbacks.checkpoint.mode must be min or max where callbacks.checkpoint.monitor=zzz, a name "
    "that does not tell which values are better, got null; type callbacks.checkpoint.mode=max",
    ("precision=tf32", "trainer.accelerator=cpu"): "precision=tf32 needs a GPU: "
    "trainer.accelerator=cpu has no TF32; use precision=fp32",
    ("precision=fp8", "trainer.accelerator=cpu"): "precision=fp8 needs a GPU: "
    "trainer.accelerator=cpu has no float8; use precision=bf16",
    ("precision=fp8", "memory=checkpointing", "memory.min_parameters=10"): "memory=checkpointing "
    "runs blocks a second time outside the float8 arithmetic of precision=fp8; use precision=bf16, "
    "or memory=none",
    ("compile=reduce_overhead", "trainer.accelerator=cpu"): "compile=reduce_overhead needs a GPU: "
    "trainer.accelerator=cpu has no CUDA graphs; use compile=default",
    ("+callbacks.a._target_=lightning.pytorch.callbacks.BatchSizeFinder",): "callbacks.a must be "
    "no technique of Lightning, of which ours know nothing, got BatchSizeFinder; leave it out, and "
    "use tuner=batch_size",
}  # fmt: skip


@pytest.mark.parametrize("typed", [*KEYS, *COMBINATIONS], ids=" ".join)
def test_what_cannot_be_done_is_refused_in_terms_of_what_was_typed(
    checked: Callable[..., Any], typed: tuple[str, ...]
) -> None:
    with pytest.raises(REFUSALS) as refusal:
        checked(*typed)
    assert explain(refusal.value) == (KEYS | COMBINATIONS)[typed]


def test_every_rule_between_groups_is_shown_above() -> None:
    from app.conf.combinations import RULES

    assert len(COMBINATIONS) == len(RULES)


def test_a_check_imports_neither_torch_nor_lightning_and_leaves_no_folder(tmp_path: Path) -> None:
    program = (
        "import sys; sys.argv = ['check', 'averaging=ema', 'clip=value'];"
        "import runpy; runpy.run_module('app.check', run_name='__main__');"
        "assert not {'torch', 'lightning', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("ok\n")
    assert list(tmp_path.iterdir()) == []


def test_an_optimizer_for_a_model_that_steps_its_own_is_refused(
    checked: Callable[..., Any],
) -> None:
    config = checked("model=custom", "model._target_=theirs.TwoOptimizers",
                     "optimizer=sgd")  # fmt: skip
    with pytest.raises(ValueError, match="optimizer") as refusal:
        build(config, [])
    assert str(refusal.value) == (
        "optimizer cannot replace those of TwoOptimizers, which steps its own "
        "(automatic_optimization=False); type optimizer=none"
    )


@pytest.mark.parametrize("key", ["model", "data"])
def test_a_target_of_another_kind_is_refused(checked: Callable[..., Any], key: str) -> None:
    config = checked("model.in_features=40", "model.num_classes=10").but(
        **{key: {"_target_": "collections.OrderedDict"}}
    )
    with pytest.raises(Refused, match=f"^{key}._target_ must be a Lightning"):
        build(config, [])
