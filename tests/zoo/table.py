"""The rows of the zoo: what is typed, and which cells are refused, or hold something else, and why.

A row has a model and a data module, named as a user names them, and overrides. `refused` says in
which columns the run is refused before its fit, and a part of what is said; `apart` why there is
nothing to compare in a column.
"""

from dataclasses import dataclass, field

COLUMNS = {
    "a": "a plain run is stock Lightning's, bit for bit",
    "b": "a run that is cut and continued is the run that was not cut",
    "c": "two ranks are one process at the same effective batch",
    "d": "each average is the one computed by hand",
    "e": "accumulation is the large batch",
    "f": "finders end, and leave nothing behind",
}


@dataclass(kw_only=True)
class Row:
    model: str = "Net"
    data: str = "Rows"
    typed: tuple[str, ...] = ()
    refused: dict[str, str] = field(default_factory=dict)
    apart: dict[str, str] = field(default_factory=dict)
    accumulated: tuple[str, ...] = ()  # typed with accumulation
    on_ranks: tuple[str, ...] = ()  # typed with several ranks


DRAWS = {"c": "ranks draw numbers of their own", "e": "a micro-batch draws as a batch does"}
STATISTICS = {"c": "of a rank's share", "e": "of a micro-batch"}
MANUAL = {"e": "steps its own optimizers"}
OTHER_ONES = dict.fromkeys("ce", "of smaller batches it leaves out others")
WHOLE = dict.fromkeys("ce", "batches are drawn whole: smaller ones come in another order")
NO_MEAN = dict.fromkeys("ce", "a weighted mean of a batch is not that of its parts")
UNSPLIT = {"c": "cannot be split from outside, which is said: each rank is to serve its own"}
EMPTY = dict.fromkeys("abcdef", "must serve a batch")
SEQUENTIAL = dict.fromkeys("abcdef", "sequential")

ROWS: dict[str, Row] = {
    "plain": Row(),
    # what a model does with its state
    "state_dict of copies": Row(model="Detached"),
    "state_dict filtered": Row(model="Lora"),
    "state_dict renamed": Row(model="Renamed"),
    "state_dict migrated on load": Row(model="Migrated"),
    "buffers written in validation": Row(model="Threshold"),
    "a queue and its pointer": Row(
        model="Queue", apart=dict.fromkeys("ce", "keeps what each micro-batch, or rank, has seen")
    ),
    "a teacher that follows": Row(model="Teacher", apart={"e": "follows each micro-batch"}),
    "tied weights": Row(model="Tied"),
    "lazy layers": Row(model="Lazy", refused={"c": "has no shape before the first batch"}),
    "running statistics": Row(model="Batchnorm", apart=STATISTICS),
    "dropout": Row(model="Dropout", apart=DRAWS),
    "draws in the test": Row(model="TestsWithNoise", apart=DRAWS),
    "counts in attributes": Row(model="Counts", apart=DRAWS),
    "frozen, in evaluation mode": Row(model="FrozenBackbone"),
    "unfreezes itself": Row(model="Unfreezes"),
    "BackboneFinetuning": Row(model="Finetuned", apart=STATISTICS),
    "grows": Row(model="Grows"),
    "shrinks": Row(model="Shrinks"),
    "configure_model": Row(model="ConfiguresModel"),
    "weight_norm": Row(model="WeightNormed"),
    "complex, scalar, listed": Row(model="Odd"),
    # optimizers and steps
    "GAN, two optimizers by hand": Row(
        model="Gan", refused=MANUAL, on_ranks=("strategy=ddp_find_unused",)
    ),
    "torch's optimizer by hand": Row(
        model="RawOptimizer", refused={**MANUAL, "c": "call self.manual_backward(loss)"}
    ),
    "accumulates by hand": Row(model="AccumulatesItself", refused=MANUAL),
    "LBFGS": Row(model="Lbfgs", refused=dict.fromkeys("ce", "LBFGS")),
    "warms up in optimizer_step": Row(model="WarmsUpByHand"),
    "parameter groups, OneCycleLR": Row(model="Groups"),
    "clips in its own hook": Row(model="ClipsItself"),
    "steps without a loss": Row(model="SkipsSteps", apart=OTHER_ONES),
    "a step returns a dict": Row(model="ReturnsDict"),
    # what a model looks at, and logs
    "asks the trainer": Row(model="LooksAround", apart=NO_MEAN),
    "draws into its logger": Row(model="Draws"),
    "slash names": Row(model="Slashes"),
    "torchmetrics": Row(model="Metrics"),
    "collects outputs": Row(model="Collects"),
    "callbacks of its own": Row(model="StopsItself"),
    # loaders
    "workers": Row(data="Rows", typed=("+data.workers=2",)),
    "workers that are kept": Row(data="Kept"),
    "random_split in setup": Row(data="Split"),
    "SubsetRandomSampler": Row(data="Subset"),
    "WeightedRandomSampler": Row(data="Weighted"),
    "a sampler's own generator": Row(data="Generated"),
    "augmentations that draw": Row(data="Augmented", apart=DRAWS),
    "batch_sampler with set_epoch": Row(data="Bucketed", apart=WHOLE),
    "batch_size=None": Row(data="Unbatched"),
    "iterable": Row(data="Streamed", apart=UNSPLIT),
    "iterable with a length": Row(data="SizedStreamed", apart=UNSPLIT),
    "a loader with a state": Row(data="WithState", apart=UNSPLIT),
    "a loader by hand": Row(data="WithHandmade", apart=UNSPLIT),
    "loaders of the model": Row(model="HasLoaders", data="none"),
    "several to validate": Row(
        data="SeveralToValidate",
        typed=("callbacks.checkpoint.monitor=val_loss/dataloader_idx_0",),
    ),
    "nothing to validate": Row(data="NothingToValidate"),
    "one batch": Row(data="OneBatch"),
    "no batch": Row(data="Empty", refused=EMPTY),
    # batches
    "dicts with texts": Row(model="ForDicts", data="Dicts"),
    "dataclasses": Row(model="ForDataclasses", data="Dataclasses"),
    "tokens": Row(
        model="ForTokens",
        data="Texts",
        accumulated=("accumulate.weight_by=num_tokens",),
        on_ranks=("accumulate=constant", "accumulate.factor=1", "accumulate.weight_by=num_tokens"),
    ),
    "batches that are None": Row(model="ForNone", data="Nones", apart=OTHER_ONES),
    "a dict of loaders": Row(model="ForSeveral", data="DictOfLoaders"),
    **{
        f"CombinedLoader, {mode}": Row(
            model="ForSeveral", data="Several", typed=(f"+data.mode={mode}",)
        )
        for mode in ("min_size", "max_size", "max_size_cycle")
    },
    "CombinedLoader, sequential": Row(
        model="ForSeveral", data="Several", typed=("+data.mode=sequential",), refused=SEQUENTIAL
    ),
}


STOCK_COUNTS = {"a": "stock counts batches, and anew in each epoch"}
STOCK_FAILS = {"a": "stock asks for a metric of the validation before there is one"}


def scheduled(name: str, interval: str, frequency: int = 1) -> Row:
    """A row of a scheduler of torch."""
    typed = (f"+model.name={name}", f"+model.interval={interval}", f"+model.frequency={frequency}")
    apart = {} if frequency == 1 else STOCK_COUNTS
    if interval == "step" and name == "ReduceLROnPlateau":
        apart = STOCK_FAILS
    return Row(model="Scheduled", typed=typed, apart=apart)
