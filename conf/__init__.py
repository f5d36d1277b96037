"""The configuration tree, reached as `pkg://app.conf`: makes every schema known to Hydra.

A group is a folder. Its `schema.py` holds a dataclass per shape of preset and names, in `PRESETS`,
the preset files that use it; its YAML files hold the numbers. Nothing else needs editing when a
group or a preset is added.
"""

from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigNode, ConfigStore
from omegaconf import MISSING, OmegaConf

from .rules import demo, run_name

GROUPS = sorted(path.parent.name for path in Path(__file__).parent.glob("*/schema.py"))


class Lazy(dict[str, Any]):
    """A mapping whose values are made, by calling what was put in, when first asked for.

    A command needs a dozen schemas, a TAB none; making them all is a sixth of a `--cfg job`.
    """

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        if callable(value):
            value = self[key] = value()
        return value


def _group(group: str) -> Lazy:
    presets = import_module(f"{__name__}.{group}.schema").PRESETS
    return _nodes(f"schema/{group}", presets)


def _nodes(path: str, shapes: dict[str, type]) -> Lazy:
    return Lazy({f"{name}.yaml": partial(_node, path, name, shapes[name]) for name in shapes})


def _node(path: str, name: str, shape: type) -> ConfigNode:
    if shape is dict:  # of the user's class: it takes keys that no schema knows
        node = OmegaConf.create({"_target_": MISSING}, flags={"struct": False})
    else:  # a file, which knows no plus, may have more callbacks and loggers, groups and variables
        is_open = getattr(shape, "_takes_others_", False) or name == "train"
        node = OmegaConf.structured(shape, flags={"struct": False} if is_open else None)
    return ConfigNode(name=f"{name}.yaml", node=node, group=path, package=None, provider=None)


OmegaConf.register_new_resolver("run_name", run_name, replace=True)
OmegaConf.register_new_resolver("demo", demo, replace=True)
_roots = _nodes("schema", import_module(f"{__name__}.schema").ROOTS)
_groups = {group: partial(_group, group) for group in GROUPS}
ConfigStore.instance().repo["schema"] = Lazy(_groups | _roots)
