"""A SLURM cluster for the tests of this folder: skipped, with a reason, where there can be none."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, why_not


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slurm)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := why_not():
        pytest.skip(reason)
    cluster = Cluster.start(tmp_path_factory.mktemp("slurm"))
    yield cluster
    cluster.stop()
