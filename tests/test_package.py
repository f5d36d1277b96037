"""The wheel: installed elsewhere, run from an unrelated folder, it is the whole program."""

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_wheel_works_from_an_unrelated_folder(tmp_path: Path) -> None:
    def run(*command: str) -> str:
        return subprocess.run(
            command, cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", ".", str(ROOT))
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    conf = {f"app/{path.relative_to(ROOT)}" for path in (ROOT / "conf").rglob("*.yaml")}
    assert conf <= set(names)
    assert {"app/data/mnist1d.npz", "hydra_plugins/app_queue.py"} <= set(names)

    run(sys.executable, "-m", "venv", "env")
    python = str(tmp_path / "env/bin/python")
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", str(wheel))
    # the dependencies of these tests serve the new environment too; the source does not
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    assert str(site) in run(python, "-c", "import app; print(app.__file__)")
    out = run(python, "-m", "app.train", "trainer.max_epochs=1", "averaging=ema", "name=wheel")
    assert "finished" in out
    assert (tmp_path / "runs/wheel/result.json").exists()
