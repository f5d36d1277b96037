"""The presets there are: ours, and those of the project that a command is typed in."""

import ast
import re
from importlib.util import find_spec
from pathlib import Path

from app import DISTRIBUTION
from app.errors import Refused, Unreadable


def help_text(config_name: str, description: str) -> str:
    """What the command does, its groups with their presets, and where to look further."""
    command = f"python -m app.{config_name}"
    lines = [description or "", "", f"usage: {command} [group=preset ...] [key=value ...]"]
    if config_name in ("train", "tune", "check"):
        lines += ["", "groups (group=preset; what it is):"]
        for group, (presets, summary) in groups(project_conf()).items():
            lines += [f"  {group}={'|'.join(presets)}", f"      {summary}"]
    lines += [
        "",
        f"{command} --cfg job           shows every key with its value",
        f"{command} --hydra-help        Hydra's own flags; -m sweeps, --config-dir adds presets",
        f'eval "$({command} -sc install=bash)"   completes on TAB; in zsh install=zsh,',
        f"{command} -sc install=fish | source in fish",
    ]
    return "\n".join(lines)


def shipped_targets() -> set[str]:
    """The classes that presets and schemas name: their settings are known without an import."""
    files = (path for kind in ("yaml", "py") for path in conf_folder().glob(f"*/*.{kind}"))
    text = "".join(path.read_text() for path in files)
    return set(re.findall(r"_target_:(?: str =)? \"?([\w.]+)", text))


def conf_folder() -> Path:
    """Where the presets are."""
    spec = find_spec("app.conf")
    assert spec is not None
    return Path(str(spec.origin)).parent


def project_files() -> Path:
    """The folder of what `python -m app.new` makes."""
    return conf_folder().with_name("project")


def project_conf() -> Path | None:
    """The presets of the project in the working directory, that its pyproject.toml names.

    Raises Refused where what it names is no folder, or the file cannot be read.
    """
    path = Path("pyproject.toml")
    if not path.is_file():
        return None
    import tomllib

    try:
        tools = tomllib.loads(path.read_text()).get("tool", {})
        name = tools.get(DISTRIBUTION, {}).get("conf")
    except (OSError, ValueError, AttributeError) as error:
        raise Unreadable(path.absolute(), error) from None
    if name is not None and not (isinstance(name, str) and Path(name).is_dir()):
        raise Refused(
            f"[tool.{DISTRIBUTION}] conf must be a folder beside {path.absolute()}, got {name!r}; "
            'write conf = "conf"'
        )
    return None if name is None else Path(name).absolute()


def groups(theirs: Path | None = None) -> dict[str, tuple[list[str], str]]:
    """Each group of the configuration: its presets, and the first sentence of its method card.

    With the presets of a folder of the user's beside ours, where one is given.
    """
    found = {}
    for folder in sorted(conf_folder().iterdir()):
        places = [folder] if theirs is None else [folder, theirs / folder.name]
        presets = sorted({path.stem for place in places for path in place.glob("*.yaml")})
        if presets:
            card = folder / "schema.py"
            text = ast.get_docstring(ast.parse(card.read_text())) if card.exists() else None
            found[folder.name] = presets, (text or "Whole runs, kept as files.").splitlines()[0]
    return found
