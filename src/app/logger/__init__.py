"""Trackers of runs: Lightning's loggers, each of which goes on with its run and ends none."""

from app.logger.mlflow import MLFlow
from app.logger.tensorboard import TensorBoard, tensorboard_where_installed
from app.logger.wandb import Wandb

__all__ = ["MLFlow", "TensorBoard", "Wandb", "tensorboard_where_installed"]
