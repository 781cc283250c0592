"""Where the app runs, and what is put there: in a checkout, in an installed package, where the user says."""

from __future__ import annotations

from pathlib import Path

import pytest

from aslseg import resources
from aslseg.errors import BadSettingsError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The app as a wheel holds it, and a data folder of the user's."""
    app = tmp_path / "site" / "app"
    app.mkdir(parents=True)
    (app / "main.py").write_text("first = 1\n")
    monkeypatch.setattr(resources, "IN_WHEEL", app)
    monkeypatch.delenv(resources.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return app


def test_a_checkout_runs_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(resources.VARIABLE, raising=False)
    assert resources.app_dir() == ROOT / "apps" / "aslseg"
    assert resources.prepare_app_dir() == ROOT / "apps" / "aslseg"
    assert not (ROOT / "apps" / "aslseg" / "main.py").is_symlink()
    assert resources.small_sam().is_file()


def test_an_installed_app_runs_in_the_users_data(installed: Path, tmp_path: Path) -> None:
    folder = resources.prepare_app_dir()
    assert folder == tmp_path / "data" / "aslseg"
    assert [p.name for p in folder.iterdir()] == ["main.py"]
    assert (folder / "main.py").read_text() == "first = 1\n"
    assert resources.small_sam().parent == installed / "pretrained"


def test_an_upgrade_replaces_the_link_and_keeps_the_models(installed: Path, monkeypatch, tmp_path: Path) -> None:
    folder = resources.prepare_app_dir()
    (folder / "model").mkdir()
    newer = tmp_path / "newer" / "app"
    newer.mkdir(parents=True)
    (newer / "main.py").write_text("second = 2\n")
    (installed / "main.py").unlink()  # the link points nowhere now
    monkeypatch.setattr(resources, "IN_WHEEL", newer)
    assert resources.prepare_app_dir() == folder
    assert (folder / "main.py").read_text() == "second = 2\n"
    assert (folder / "model").is_dir()


def test_a_main_of_ones_own_is_left_alone(installed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "main.py").write_text("mine = 3\n")
    monkeypatch.setenv(resources.VARIABLE, str(own))
    assert resources.prepare_app_dir() == own
    assert (own / "main.py").read_text() == "mine = 3\n"


def test_a_folder_that_cannot_be_made(installed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file where a folder is needed")
    with pytest.raises(BadSettingsError, match="set ASLSEG_APP_DIR"):
        resources.prepare_app_dir()


def test_a_user_without_a_home(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setattr(resources.os.path, "expanduser", lambda path: path)
    with pytest.raises(BadSettingsError, match="expected a home folder"):
        resources.app_dir()
