"""A checkpoint is, byte for byte, what was written, or it is refused."""

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL

from app.errors import Refused
from app.process.files import replacing
from app.run.build import build
from app.run.checkpoint import CheckpointFiles, newest_intact

NUM_FLIPS = int(os.environ.get("APP_TEST_FLIPS", "200"))
FILES = CheckpointFiles()


def content() -> dict[str, Any]:
    """Tensors of many kinds, some of which share memory, and plain values."""
    generator = torch.Generator().manual_seed(0)
    weights = {f"layer.{i}": torch.randn(3 + i, 5, generator=generator) for i in range(8)}
    weights["bytes"] = torch.arange(200, dtype=torch.uint8)
    weights["half"] = torch.randn(9, generator=generator).bfloat16()
    weights["tied"] = weights["layer.0"]
    return {
        "pytorch-lightning_version": "2.6",
        "state_dict": weights,
        "epoch": 3,
        "name": "x" * 100,
        "none": None,
    }


def write_ours(path: Path) -> None:
    FILES.save_checkpoint(content(), path)


def write_theirs(path: Path) -> None:
    torch.save(content(), path)


def is_same(found: dict[str, Any]) -> bool:
    expected = content()
    if (
        found.keys() != expected.keys()
        or found["state_dict"].keys() != expected["state_dict"].keys()
    ):
        return False
    return all(
        tensor.dtype == found["state_dict"][name].dtype
        and torch.equal(tensor, found["state_dict"][name])
        for name, tensor in expected["state_dict"].items()
    ) and all(found[key] == expected[key] for key in ("epoch", "name", "none"))


@pytest.mark.parametrize("write", [write_ours, write_theirs])
@pytest.mark.filterwarnings("ignore")
def test_a_flipped_bit_is_found_or_changes_nothing(
    tmp_path: Path, write: Callable[[Path], None]
) -> None:
    path = tmp_path / "x.ckpt"
    write(path)
    whole = path.read_bytes()
    assert is_same(FILES.load_checkpoint(path))
    draw = random.Random(0)
    found = 0
    for _ in range(NUM_FLIPS):
        flipped = bytearray(whole)
        flipped[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        damaged = tmp_path / f"{draw.random()}.ckpt"  # a new name: what is known of a file is kept
        damaged.write_bytes(flipped)
        try:
            assert is_same(FILES.load_checkpoint(damaged))
        except Refused:
            found += 1
        damaged.unlink()
    print(f"{found} of {NUM_FLIPS} found, the others changed nothing")
    assert found > 0.95 * NUM_FLIPS or write is write_theirs


@pytest.mark.parametrize("length", [0, 1, 21, 1000, -1, -19, -40])
def test_a_torn_checkpoint_is_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "x.ckpt"
    write_ours(path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(Refused, match=r"x\.ckpt is damaged: "):
        FILES.load_checkpoint(path)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (b"epoch: 3\n" * 100, "is damaged: it is not a whole archive"),
        (b"\0" * 5000, "is damaged: it is not a whole archive"),
    ],
)
def test_what_is_no_archive_is_refused(tmp_path: Path, made: bytes, said: str) -> None:
    path = tmp_path / "x.ckpt"
    path.write_bytes(made)
    with pytest.raises(Refused, match=said):
        FILES.load_checkpoint(path)


def test_an_archive_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save(torch.ones(3), path)
    with pytest.raises(Refused, match=r"x\.pt is no checkpoint of a LightningModule"):
        FILES.load_checkpoint(path)


def test_a_plain_reader_loads_what_we_write(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    write_ours(path)
    assert is_same(torch.load(path, weights_only=True))
    assert is_same(torch.load(path, weights_only=True, mmap=True))


@pytest.mark.filterwarnings("ignore:.*looking for the one before")
def test_where_no_checkpoint_is_whole_nothing_begins_anew(
    checked: Callable[..., Any], tmp_path: Path
) -> None:
    run = build(checked(*SMALL), [])
    run.trainer.fit(run.model, datamodule=run.data)
    for path in (tmp_path / "run/checkpoints").glob("*.ckpt"):
        path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(Refused, match="type resume=never"):
        newest_intact(tmp_path / "run/checkpoints")


def test_a_file_reaches_the_disk_before_its_name_and_its_name_before_what_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened = []
    fsync, replace = os.fsync, Path.replace

    def note_fsync(descriptor: int) -> None:
        happened.append(f"fsync {os.readlink(f'/proc/self/fd/{descriptor}')}")
        fsync(descriptor)

    def note_replace(path: Path, target: Path) -> Path:
        happened.append(f"rename {path}")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "replace", note_replace)
    write_ours(tmp_path / "x.ckpt")
    partial = tmp_path / f".x.ckpt.{os.getpid()}.part"
    assert happened == [f"fsync {partial}", f"rename {partial}", f"fsync {tmp_path}"]


def test_what_raises_while_it_is_written_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old")

    def write() -> None:
        with replacing(path) as file:
            file.write(b"new")
            raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
