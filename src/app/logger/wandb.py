"""Weights & Biases."""

import os
import secrets
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.loggers import WandbLogger

from app.logger.tracker import Tracker
from app.process.ranks import ranks

SERVER = "https://api.wandb.ai"


class Wandb(Tracker, WandbLogger):
    """Lightning's WandbLogger, but offline where there is no login, and one run where it is cut.

    Args:
        save_dir: folder of its files.
        project: None is WANDB_PROJECT, or else the name of the working directory.
        entity: user or team; None is WANDB_ENTITY, or else the one that is logged in.
        name: of the run; None is its folder.
        tags: of the run.
        group: None is WANDB_RUN_GROUP, or else the folder of the sweep.
        offline: whether to write files only; None is WANDB_MODE, or else where no login is.
        checkpoints: whether the checkpoint that is delivered is among the files of the run.
    """

    service = "wandb"
    instead = "put WANDB_MODE=offline before the command"

    def __init__(
        self,
        *,
        save_dir: str,
        project: str | None,
        entity: str | None,
        name: str | None,
        group: str | None,
        tags: Sequence[str],
        offline: bool | None,
        checkpoints: bool,
    ) -> None:
        self._folder = Path(save_dir)
        self.checkpoints = checkpoints
        mode = {True: "offline", False: "online", None: None}[offline]
        if offline is None and "WANDB_MODE" not in os.environ and not has_login():
            mode = "offline"
        if (mode or os.environ.get("WANDB_MODE")) != "online":
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # asks for an address
        noted = self.noted().get("id") or os.environ.get("WANDB_RUN_ID")
        made = secrets.token_hex(4) if ranks().is_first else None  # draws from none of the run's
        self._run_id = noted or made
        super().__init__(
            save_dir=save_dir,
            project=project or os.environ.get("WANDB_PROJECT") or Path.cwd().name,
            entity=entity,
            name=name or self.run_name,
            group=group or os.environ.get("WANDB_RUN_GROUP") or self.group,
            tags=list(tags),
            mode=mode,
            id=self._run_id,
        )
        self._wandb_init.pop("anonymous", None)  # Lightning's None, of which W&B warns

    def begin(self) -> None:
        """Begin the run, or go on with it."""
        self._folder.mkdir(parents=True, exist_ok=True)
        _ = self.experiment
        self.note(id=str(self._run_id))


def has_login() -> bool:
    """Whether the environment, or a .netrc, holds a key of W&B's server."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    from requests.utils import get_netrc_auth  # which W&B uses too

    return get_netrc_auth(os.environ.get("WANDB_BASE_URL", SERVER)) is not None
