"""Beginning a fit from weights that are there: of another run, of Lightning's, or of anybody's."""

import pickle
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from app.begin.source import source_of
from app.config import Config
from app.errors import Refused
from app.parallel.sharded import placed_like
from app.process.intact import refuse_damaged

RAW = "raw"
"""Where a checkpoint of ours keeps what the model writes of its raw weights."""

RAW_OF_LIGHTNING = "current_model_state"
"""Where Lightning's WeightAveraging keeps them, beside the average."""

AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "model_averaged")
"""Where others keep an average, beside the raw weights."""

NAMES = ("state_dict", "model_state_dict", "model", "module", "net", "network", "weights", "params")
"""Where others keep the weights."""

MOST_SHOWN = 4


class Inert:
    """Stands for a class that is not imported, so that the weights beside its objects are read."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        """Nothing, as of all that they are made with."""

    def __setstate__(self, state: Any) -> None:
        """Nothing."""


class InertMapping:
    """Likewise for a class of mappings, whose items torch sets in those of Python alone."""

    def __new__(cls, *args: Any, **settings: Any) -> Any:
        return OrderedDict()


def read(path: Path) -> dict[str, Any]:
    """What a file of weights holds; runs no code that it names, and makes nothing of its objects.

    Raises Refused where it is damaged, or none.
    """
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise Refused(
                f"init_from={path} needs the package safetensors, which is not installed; type pip "
                "install safetensors"
            ) from None
        return dict(load_file(path))
    with path.open("rb") as file:
        is_archive = file.read(2) == b"PK"  # or of a torch before 1.6, without a checksum
    if is_archive:
        refuse_damaged(path)
    try:
        others = torch.serialization.get_unsafe_globals_in_checkpoint(path) if is_archive else []
        stubs: list[Any] = [
            (InertMapping if name.lower().endswith("dict") else Inert, name) for name in others
        ]
        with torch.serialization.safe_globals(stubs):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except pickle.UnpicklingError as error:
        raise Refused(
            f"init_from={path} holds what only code could load, which is not run: "
            f"{' '.join(str(error).split()):.200}; where you trust it, save "
            "torch.load(PATH, weights_only=False)['state_dict'] to a file"
        ) from error
    except Exception as error:  # of a file of somebody else's: almost anything
        words = " ".join([f"{type(error).__name__}:", *str(error).split()])
        raise Refused(f"init_from={path} is no file that torch can read: {words:.200}") from error
    if not isinstance(content, dict):
        of_code = isinstance(content, Inert)
        what = "whole object, whose code is not run" if of_code else type(content).__name__
        raise Refused(
            f"init_from={path} must hold a mapping of weights, got a {what}; save its state_dict() "
            "to a file"
        )
    return {str(key): value for key, value in content.items()}


def weights_in(content: Mapping[str, Any], path: Path, chosen: str | None) -> dict[str, Any]:
    """The entries, by name: those that the file is of, the averaged, or the raw ones.

    Those of several parts have the names of these before theirs. Raises Refused where it has not
    those that are chosen, or none.
    """
    raw = content.get(RAW_OF_LIGHTNING)
    other = next((content[name] for name in AVERAGED if _are_weights(content.get(name))), None)
    has_both = RAW in content or raw is not None or other is not None
    if chosen is not None and not has_both:
        raise Refused(
            f"init_weights={chosen} needs an average beside raw weights, and {path} holds one set; "
            "leave it out"
        )
    if chosen == "averaged" and other is not None and RAW not in content and raw is None:
        return dict(other)
    if chosen == "raw" and raw is not None:
        return dict(raw)
    if _are_weights(content):
        return dict(content)
    named = [name for name in NAMES if _are_weights(content.get(name))]
    named = named or [name for name, value in content.items() if _are_weights(value)]
    if len(named) > 1 and named[0] not in NAMES:  # of a GAN: generator, discriminator
        return {f"{part}.{name}": item for part in named for name, item in content[part].items()}
    if not named:
        has = ", ".join(list(content)[:10]) or "nothing"
        raise Refused(
            f"init_from={path} must hold weights by name, or under {NAMES[0]}, got {has}; save "
            "model.state_dict() to a file"
        )
    return dict(content[named[0]])


def _are_weights(value: Any) -> bool:
    """Whether a mapping is one of tensors by name; extra state of a module may be among them."""
    if not isinstance(value, Mapping) or not value:
        return False
    tensors = sum(isinstance(item, Tensor) for item in value.values())
    return tensors > 0 and 2 * tensors >= len(value)


def renamed(name: str, prefixes: Mapping[str, str]) -> str:
    """The name of an entry with the names of modules before it replaced, the longest that fits."""
    for old in sorted(prefixes, key=len, reverse=True):
        if name == old or name.startswith(f"{old}."):
            return f"{prefixes[old]}{name[len(old) :]}".lstrip(".")
    return name


def fitted(names: Mapping[str, str], wanted: Collection[str], path: Path) -> dict[str, str]:
    """What each entry of a file is called in the model, by its name, with that it has so far.

    As it is, where that holds for any; else what makes the most of them the model's: without what
    begins all of them (`module.`, `model.`), and below one of its modules. Raises Refused where two
    are as good.
    """
    if not names or any(name in wanted for name in names.values()):
        return dict(names)
    parts = next(iter(names.values())).split(".")
    starts = ["".join(f"{part}." for part in parts[:n]) for n in range(len(parts))]
    starts = [start for start in starts if all(n.startswith(start) for n in names.values())]
    heads = {"".join(f"{part}." for part in n.split(".")[:k]) for n in wanted for k in (0, 1, 2)}
    fits: Counter[tuple[str, str]] = Counter()
    for start in starts:
        bare = [name[len(start) :] for name in names.values()]
        for head in heads:
            fits[start, head] = sum(f"{head}{name}" in wanted for name in bare)
    best = max(fits.values(), default=0)
    if best == 0:
        return dict(names)
    found = [
        {old: f"{head}{name[len(start) :]}" for old, name in names.items()}
        for (start, head), number in sorted(fits.items())
        if number == best
    ]
    if any(other != found[0] for other in found):
        places = sorted({next(iter(one.values())) for one in found})
        raise Refused(
            f"init_from={path} fits several parts of the model alike: {parts[-1]} of it may be "
            f"{' or '.join(places)}; choose by 'init_only={places[0].split('.')[0]}.*'"
        )
    return found[0]


@dataclass(kw_only=True)
class InitialWeights:
    """The weights that a fit begins from; a fit that continues has its own.

    Args:
        init_from: as of `source_of`.
        weights: averaged or raw, of a file that has both; None: what the file is of.
        only: patterns of the names of the entries to take, as far as they fit; None: all, exactly.
        rename: names of modules in the file, each with that in the model.

    Attributes:
        report: what was taken; empty before.
    """

    init_from: str
    weights: str | None
    only: list[str] | None
    rename: Mapping[str, str]
    report: dict[str, Any] = field(default_factory=dict)

    def before(self, model: pl.LightningModule, configure_optimizers: Callable[[], Any]) -> Any:
        """Take them when the layers are made and placed, before an optimizer knows of them."""
        if not self.report:
            self.take(model)
        return configure_optimizers()

    def take(self, model: pl.LightningModule) -> None:
        """Raises Refused where the weights are not those of the model, or none is taken."""
        path = source_of(self.init_from)
        content = read(path)
        if self.weights == "raw" and RAW in content:
            content |= content[RAW]
        if self.only is None and "pytorch-lightning_version" in content:
            model.on_load_checkpoint(content)  # as Lightning's load_from_checkpoint does
        there = weights_in(content, path, self.weights)
        mine = model.state_dict()
        names = {name: renamed(name.replace("_orig_mod.", ""), self.rename) for name in there}
        if "n_averaged" not in mine:
            names.pop("n_averaged", None)  # of torch's AveragedModel
        wanted = [name for name in mine if self._is_chosen(name)]
        if not self.rename:
            names = fitted(names, wanted, path)
        chosen = {new: there[old] for old, new in names.items() if self._is_chosen(new)}
        others = {name: _difference(value, mine[name]) for name, value in chosen.items()
                  if name in mine}  # fmt: skip
        misfits = {name: text for name, text in others.items() if text}
        if self.only is not None:
            misfits |= dict.fromkeys(chosen.keys() - mine.keys(), "not in the model")
            chosen = {name: chosen[name] for name in wanted if name in chosen}
        values = {
            name: placed_like(mine[name], value)
            if isinstance(mine.get(name), Tensor) and isinstance(value, Tensor)
            else value
            for name, value in chosen.items()
            if name not in misfits
        }
        if not values.keys() & mine.keys() or (misfits and self.only is None):
            raise Refused(self._refusal(path, model, misfits, [*there]))
        keys = model.load_state_dict(values, strict=False)
        missing = [name for name in mine if name not in values]
        if self.only is None:
            missing = list(getattr(keys, "missing_keys", missing))
            unknown = list(getattr(keys, "unexpected_keys", values.keys() - mine.keys()))
            if unknown or (missing and model.strict_loading):
                misfits = dict.fromkeys(unknown, "not in the model")
                misfits |= dict.fromkeys(missing, "not in the file")
                raise Refused(self._refusal(path, model, misfits, [*there]))
        place: dict[str, Any] = {
            name: content[name] for name in ("epoch", "global_step") if name in content
        }
        self.report |= place | {
            "file": str(path),
            "weights": self.weights or ("averaged" if RAW in content else "as saved"),
            "taken": len(values.keys() & mine.keys()),
            "not_taken": [f"{name} ({why})" for name, why in sorted(misfits.items())],
            "not_in_file": sorted(missing),
        }

    def _is_chosen(self, name: str) -> bool:
        return self.only is None or any(fnmatchcase(name, pattern) for pattern in self.only)

    def _refusal(
        self, path: Path, model: pl.LightningModule, misfits: Mapping[str, str], there: list[str]
    ) -> str:
        what = f"init_from={path} does not fit {type(model).__name__}"
        if self.only is None and misfits:
            text = _some([f"{name} ({why})" for name, why in sorted(misfits.items())])
            return f"{what}: {text}; to take what fits type 'init_only=*'"
        of = "" if self.only is None else f" of init_only={','.join(self.only)}"
        return (
            f"{what}: nothing{of} is taken: it has {_some(there)}, and the model "
            f"{_some([*model.state_dict()])}; type 'init_rename={{OLD: NEW}}'"
        )

    def rows(self) -> list[tuple[str, str]]:
        """What is said of it at the start."""
        if not self.report:
            return []
        step = self.report.get("global_step")
        place = f", {self.report['weights']}" + (f", step {step}" if step is not None else "")
        text = f"{self.report['file']}{place}: {self.report['taken']} entries"
        for key, words in (("not_taken", "not taken"), ("not_in_file", "as initialized")):
            if self.report[key]:
                text += f"; {words}: {_some(self.report[key])}"
        return [("init_from", text)]


def _difference(theirs: Any, mine: Any) -> str:
    """Why a value does not fit; empty where it does."""
    if not (isinstance(theirs, Tensor) and isinstance(mine, Tensor)) or is_lazy(mine):
        return "" if isinstance(theirs, Tensor) == isinstance(mine, Tensor) else "of another kind"
    if theirs.shape == mine.shape:
        return ""
    return f"{_size(theirs)}, the model's {_size(mine)}"


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"


def _some(names: list[str]) -> str:
    left = len(names) - MOST_SHOWN
    return ", ".join(names[:MOST_SHOWN]) + (f" and {left} more" if left > 0 else "")


def initial_weights(config: Config) -> InitialWeights | None:
    """As a configuration says; None where a fit begins from what the model draws."""
    if config.init_from is None:
        return None
    only = config.init_only
    return InitialWeights(
        init_from=config.init_from,
        weights=None if config.init_weights is None else str(config.init_weights),
        only=[only] if isinstance(only, str) else None if only is None else list(only),
        rename=config.init_rename or {},
    )
