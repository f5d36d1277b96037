"""Which parameters of a model a glob names."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from app.errors import Refused


class Matches:
    """Which parameters of a model globs match: of their names, or of the classes that hold them."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._names: dict[nn.Parameter, list[str]] = {}
        self._kinds: dict[nn.Parameter, list[type]] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            owner = model.get_submodule(path.partition(".parametrizations.")[0])
            kinds = [kind for kind in type(owner).__mro__ if issubclass(kind, nn.Module)]
            for name, parameter in module.named_parameters(recurse=False):
                self._names.setdefault(parameter, []).append(f"{path}.{name}" if path else name)
                self._kinds.setdefault(parameter, []).extend(set(kinds) - {nn.Module})

    def found(self, globs: Sequence[str], key: str, *, is_optional: bool) -> list[nn.Parameter]:
        """Those that any of its globs matches. Raises Refused where one matches none."""
        found: dict[nn.Parameter, None] = {}
        for glob in globs:
            mine = [parameter for parameter in self._names if self._matches(glob, parameter)]
            if not mine and not is_optional:
                raise Refused(
                    f"{key}={glob} matches no parameter of {type(self._model).__name__}, by its "
                    f"name, or by the class of the module that holds it; it has {self._some()}"
                )
            found |= dict.fromkeys(mine)
        return list(found)

    def name(self, parameter: nn.Parameter) -> str:
        """Its first name."""
        return self._names[parameter][0]

    def _matches(self, glob: str, parameter: nn.Parameter) -> bool:
        package, _, name = glob.rpartition(".")
        return any(fnmatchcase(one, glob) for one in self._names[parameter]) or any(
            fnmatchcase(kind.__name__, glob)
            or (kind.__name__ == name and f"{kind.__module__}.".startswith(f"{package}."))
            for kind in self._kinds[parameter]
        )

    def _some(self) -> str:
        names = [names[0] for names in self._names.values()]
        kinds = sorted({kinds[0].__name__ for kinds in self._kinds.values() if kinds})
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if names[5:] else "")
        return f"{shown}, in modules {', '.join(kinds[:10])}"
