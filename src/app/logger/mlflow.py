"""MLflow."""

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import MLFlowLogger

from app.logger.tracker import Tracker

SQLITE = "sqlite:///"


class MLFlow(Tracker, MLFlowLogger):
    """Lightning's MLFlowLogger, but one run where it is cut, and any key.

    Args:
        save_dir: folder of the run.
        tracking_uri: None is MLFLOW_TRACKING_URI, or else mlflow.db in the working directory.
        experiment_name: None is MLFLOW_EXPERIMENT_NAME, or else the name of the working directory.
        run_name: of the run; None is its folder.
        tags: of the run.
        group: the tag of this name; None is the folder of the sweep.
        checkpoints: whether the checkpoint that is delivered is among the files of the run.
    """

    service = "mlflow"
    instead = f"put MLFLOW_TRACKING_URI={SQLITE}mlflow.db before the command"

    def __init__(
        self,
        *,
        save_dir: str,
        tracking_uri: str | None,
        experiment_name: str | None,
        run_name: str | None,
        group: str | None,
        tags: dict[str, str],
        checkpoints: bool,
    ) -> None:
        self._folder = Path(save_dir)
        self.checkpoints = checkpoints
        self._uri = (
            tracking_uri
            or os.environ.get("MLFLOW_TRACKING_URI")
            or f"{SQLITE}{Path.cwd() / 'mlflow.db'}"
        )
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")  # of which each waits longer
        noted = self.noted()
        self._experiment_named = (
            experiment_name or os.environ.get("MLFLOW_EXPERIMENT_NAME") or Path.cwd().name
        )
        group = group or self.group
        known = noted.get("run_id") if noted.get("tracking_uri") == self._uri else None
        try:
            with self._alone():
                super().__init__(
                    tracking_uri=self._uri,
                    experiment_name=self._experiment_named,
                    run_name=run_name or self.run_name,
                    tags={**tags, **({} if group is None else {"group": group})},
                    run_id=known,
                )
        except Exception as error:  # of a local file
            raise self.refusal(error) from error

    @property
    def save_dir(self) -> str:
        """Folder of the run."""
        return str(self._folder)

    def begin(self) -> None:
        """Begin the run, or go on with it."""
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        with self._alone():
            with suppress(MlflowException):  # it is there, perhaps made by another process just now
                MlflowClient(self._uri).create_experiment(self._experiment_named)
            client = self.experiment
            client.update_run(self.run_id, status="RUNNING")
            self.note(run_id=str(self.run_id), tracking_uri=self._uri)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Let one process at a time make the tables of a local file, and experiments in it."""
        if not self._uri.startswith(SQLITE):
            yield
            return
        path = Path(self._uri.removeprefix(SQLITE))
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_name(f".{path.name}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """As Lightning's, of keys that are not there yet: MLflow allows no change."""
        with self.spared():
            known = self.experiment.get_run(self.run_id).data.params
            found = {re.sub(r"[^\w\-./: ]", "_", str(key)): value for key, value in params.items()}
            new = {key: value for key, value in found.items() if key not in known}
            super().log_hyperparams(new)
