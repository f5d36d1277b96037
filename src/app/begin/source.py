"""Which file of weights `init_from` means. Needs no torch."""

from pathlib import Path

from app.errors import Refused
from app.record.folder import RunFolder

SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")
"""Of the files that are looked for in a folder that no run of ours has left."""


def source_of(init_from: str) -> Path:
    """The file: itself, or of a run's folder the checkpoint that it delivers, the best or the last.

    Of another folder the only one in it, or in its `checkpoints`. Raises Refused where there is
    none, or several.
    """
    path = Path(init_from)
    if path.is_file():
        return path
    rule = f"init_from must be the folder of a run, or a file of weights, got {init_from}"
    if not path.is_dir():
        raise Refused(f"{rule}: there is none; type init_from=runs/NAME, or init_from=PATH.ckpt")
    folder = RunFolder(path)
    kept: dict[str, str] = (folder.read_result() or {}).get("checkpoints") or {}
    delivered = [path / kept[name] for name in ("best", "last") if kept.get(name)]
    delivered += [folder.checkpoints / f"{name}.ckpt" for name in ("best", "last", "previous")]
    for file in delivered:
        if file.is_file():
            return file
    places = (path, folder.checkpoints)
    others = [f for place in places for f in sorted(place.glob("*")) if f.suffix in SUFFIXES]
    files = [file for file in others if file.is_file()]
    if len(files) == 1:
        return files[0]
    if any((folder / "latest").exists() for folder in others):
        instead = "DeepSpeed wrote it: make a file of it with its zero_to_fp32.py"
    else:
        instead = f"type init_from={files[0]}" if files else "type init_from=PATH.ckpt"
    raise Refused(f"{rule}, which holds {len(files) or 'none'}; {instead}")
