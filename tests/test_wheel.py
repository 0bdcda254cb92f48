"""The wheel, built and installed somewhere else, brings its configuration along."""

import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import toolkit

ROOT = Path(toolkit.__file__).parents[1]


@pytest.mark.wheel
@pytest.mark.slow
def test_installed_wheel_runs(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)  # a checkout on it would hide the wheel
    private = ROOT / "conf/local/wheel_test.yaml"
    private.parent.mkdir(exist_ok=True)
    private.write_text("seed: 7\n")  # one's own settings, not in git, must not travel
    request.addfinalizer(private.unlink)
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        (metadata,) = (packed.read(name).decode() for name in packed.namelist() if name.endswith("/METADATA"))
        assert "\n# RL loss toolkit\n" in metadata
        assert not re.search(r"\]\((?!https?://)", metadata)
        names = {name for name in packed.namelist() if name.startswith("toolkit/_conf/")}
        files = ["toolkit/peers/words.toml", "toolkit/report/page.html", "toolkit/report/page.js"]
        files += ["toolkit/notebook/charts.js", "toolkit/notebook/tokens.js"]
        assert {*files} <= {*packed.namelist()}
    own = {f"toolkit/_conf/{path.relative_to(ROOT / 'conf')}" for path in (ROOT / "conf").rglob("*.yaml")}
    assert names == {name for name in own if "/local/" not in name}
    home = tmp_path / "elsewhere"
    venv.create(home, with_pip=True)
    # Dependencies are borrowed from this environment; a plain path line does not bring its editable installs along.
    (site,) = home.glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run([home / "bin/pip", "install", "-q", "--no-deps", wheel], check=True, capture_output=True)
    where = subprocess.run(
        [home / "bin/python", "-c", "import toolkit.compose.schemas as c; print(c.__file__, c.conf_dir())"],
        capture_output=True, text=True, check=True, cwd=tmp_path,
    ).stdout.split()  # fmt: skip
    assert all(path.startswith(str(home)) for path in where)
    assert (site / "toolkit/py.typed").is_file()
    done = subprocess.run(
        [home / "bin/toolkit-train", "--cfg", "job", "kl=k3"], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert "kl_loss_type: k3" in done.stdout
    done = subprocess.run(
        [home / "bin/toolkit-train", "loss=grop"], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 1
    assert "try: loss=grpo" in done.stderr
    subprocess.run(
        [home / "bin/toolkit-train", "debug=smoke", "hydra.run.dir=out"],
        capture_output=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    assert (tmp_path / "out/summary.json").is_file()
