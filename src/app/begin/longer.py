"""Going on with a finished run to a larger length: `extend`. Needs no torch."""

import math
from collections.abc import Mapping
from typing import Any

from app.config import what_decides
from app.errors import Refused
from app.process.files import write_json
from app.record.folder import RunFolder
from app.record.states import State

LENGTHS = ("trainer.max_epochs", "trainer.max_steps")
RELAY = "relay"


def extension(config: Mapping[str, Any], folder: RunFolder, *, how: bool | str) -> dict[str, Any]:
    """The lengths that change, each with the old and the new one; empty where none does.

    Raises Refused where the run in the folder cannot go on as if it had been as long from its
    start, or with its schedules laid out anew where `how` is relay.
    """
    before = folder.read_config()
    if before is None:
        raise Refused(f"extend goes on with a run, and {folder.path} holds none; leave extend out")
    old, new = what_decides(before), what_decides(config)
    changed = {key for key in {*old, *new} if old.get(key) != new.get(key)}
    if not changed or not changed <= {*LENGTHS}:
        return {}  # or another configuration, which is refused
    lengths = {key: [old.get(key), new.get(key)] for key in sorted(changed)}
    for key, (was, becomes) in lengths.items():
        if (math.inf if becomes is None else becomes) < (math.inf if was is None else was):
            raise Refused(f"extend needs a larger {key} than {was}, got {becomes}; type {key}=N")
    _refuse_other_end(before, folder)
    relaid = of_length(before)
    if relaid and (how != RELAY or "averaging.start" in relaid):
        anew = f"begin a run of another name= with init_from={folder.path}"
        instead = anew if "averaging.start" in relaid else f"type extend={RELAY}, or {anew}"
        raise Refused(
            f"extend changes the length over which {' and '.join(relaid)} "
            f"{'is' if len(relaid) == 1 else 'are'} laid out; to go on with a new layout {instead}"
        )
    return lengths


def _refuse_other_end(before: Mapping[str, Any], folder: RunFolder) -> None:
    """Raise Refused where the run has ended before its length."""
    result = folder.read_result() or {}
    if not State(result.get("status", State.interrupted)).is_done:
        return
    trainer = before["trainer"]
    by_epochs = trainer.get("max_epochs") is not None and result["epochs"] >= trainer["max_epochs"]
    if ended_by_steps(before, result):
        if not (folder.checkpoints / "previous.ckpt").is_file():
            raise Refused(
                f"extend: {folder.path} was ended by trainer.max_steps={trainer['max_steps']} with "
                "no checkpoint from before; begin a run of another name= with "
                f"init_from={folder.path}"
            )
    elif not by_epochs or result["status"] == State.pruned:
        raise Refused(
            f"extend: {folder.path} is {result['status']} after {result.get('epochs')} epochs, and "
            "it was not its length that ended it: longer it would have ended there too; begin a "
            f"run of another name= with init_from={folder.path}"
        )


def ended_by_steps(before: Mapping[str, Any], result: Mapping[str, Any]) -> bool:
    """Whether a finished run has made as many optimizer steps as it was to make.

    Lightning then ends the epoch where it stands: the checkpoint before is inside of it, or at the
    end of the one before.
    """
    steps = before["trainer"].get("max_steps")
    is_done = State(result.get("status", State.interrupted)).is_done
    return is_done and steps is not None and result["optimizer_steps"] >= steps


def of_length(config: Mapping[str, Any]) -> list[str]:
    """What of a configuration is laid out over the whole length of the run."""
    found = []
    scheduler, averaging = config.get("scheduler") or {}, config.get("averaging") or {}
    kind = str(scheduler.get("_target_")).rpartition(".")[2]
    is_open = scheduler.get("shape") == "constant" and isinstance(scheduler.get("warmup"), int)
    is_laid = kind in ("OneCycle", "WarmupStableDecay")
    if is_laid or (kind == "WarmupDecay" and not is_open):
        found.append("the schedule")
    has_memory = averaging.get("decay") is None and averaging.get("half_life_steps") is None
    if "horizon" in averaging and has_memory:
        found.append("averaging.horizon")
    if isinstance(averaging.get("start"), float):
        found.append("averaging.start")
    return found


def reopen(folder: RunFolder, lengths: Mapping[str, Any], *, how: bool | str) -> None:
    """Let a finished run be unfinished; what it came to stays beside, as `result.1.json`."""
    result = folder.read_result()
    if result is None:
        return
    number = 1
    while (kept := folder.path / f"result.{number}.json").exists():
        number += 1
    note = {**lengths, "relay": how == RELAY, "epochs": result.get("epochs")}
    if State(result["status"]).is_done:
        write_json(kept, result)
        note["result"] = kept.name
    if ended_by_steps(folder.read_config() or {"trainer": {}}, result):
        part = folder.checkpoints / "last.ckpt.part"
        part.unlink(missing_ok=True)
        part.hardlink_to(folder.checkpoints / "previous.ckpt")
        part.replace(folder.checkpoints / "last.ckpt")
    status = State.interrupted if State(result["status"]).is_done else result["status"]
    extended = [*result.get("extended", []), note]
    folder.write_result({**result, "status": status, "extended": extended})
