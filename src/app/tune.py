"""Searches micro-batch and learning rate, then trains with both: `python -m app.tune`."""

from app import cli, train

if __name__ == "__main__":
    cli.main(train.main, "tune", __doc__, train.completed)
