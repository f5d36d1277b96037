"""The configuration tree, reached as `pkg://app.conf`: registers every schema with Hydra.

A group is a folder. Its `schema.py` holds a dataclass per shape of preset and names, in `PRESETS`,
the preset files that use it; its YAML files hold the numbers. Nothing else needs editing when a
group or a preset is added.
"""

from importlib import import_module
from pathlib import Path

from hydra.core.config_store import ConfigStore

from . import schema

GROUPS = sorted(path.parent.name for path in Path(__file__).parent.glob("*/schema.py"))

_store = ConfigStore.instance()
for _name, _shape in schema.ROOTS.items():
    _store.store(group="schema", name=_name, node=_shape)
for _group in GROUPS:
    for _name, _shape in import_module(f"{__name__}.{_group}.schema").PRESETS.items():
        _store.store(group=f"schema/{_group}", name=_name, node=_shape)
