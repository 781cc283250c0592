from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from aslseg.errors import BadSettingsError
from aslseg.resources import app_dir
from aslseg.settings import GROUPS, PLATFORM_KEYS, Paths, Settings, load_settings, relevant

NO_FILE = Path("/nonexistent/.env")


def load(conf=None, env=None, dotenv=NO_FILE):
    return load_settings(conf, env or {}, dotenv)


def test_defaults_are_valid_and_described():
    settings, origin = load()
    assert set(origin.values()) == {"default"}
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert "example" in field.json_schema_extra, name
    assert settings.label_set.names == ("liver", "tumour")


def test_conf_over_environment_over_dotenv(tmp_path):
    (tmp_path / ".env").write_text("ASLSEG_SEED=1\nASLSEG_THREADS=1\nASLSEG_LABELS=atrium\nOTHER=1\n")
    env = {"ASLSEG_SEED": "2", "ASLSEG_THREADS": "2", "PATH": "/bin"}
    settings, origin = load({"seed": "3"}, env, tmp_path / ".env")
    assert (settings.seed, settings.threads, settings.labels) == (3, 2, "atrium")
    assert (origin["seed"], origin["threads"], origin["labels"], origin["home"]) == (
        "conf",
        "environment",
        ".env",
        "default",
    )


def test_environment_of_the_process_by_default(monkeypatch):
    monkeypatch.setenv("ASLSEG_SEED", "77")
    assert load_settings({}, dotenv=NO_FILE)[0].seed == 77


@pytest.mark.parametrize(
    ("conf", "env", "message"),
    [
        ({"label": "a"}, {}, r"unknown setting 'label' in conf; did you mean 'labels'\?"),
        ({"zzzzzzzz": "a"}, {}, "valid names are: accumulate"),
        ({}, {"ASLSEG_SEDE": "1"}, r"unknown setting 'sede' in environment; did you mean 'seed'\?"),
    ],
)
def test_unknown_keys(conf, env, message):
    with pytest.raises(BadSettingsError, match=message):
        load(conf, env)


def test_keys_of_the_platform_are_passed_over():
    load(dict.fromkeys(PLATFORM_KEYS, "x"))


def test_app_folder_is_no_setting():
    load(env={"ASLSEG_APP_DIR": "/somewhere"})


@pytest.mark.parametrize(
    ("conf", "message"),
    [
        ({"seed": "x"}, "seed"),
        ({"seed": "-1"}, "seed: .*greater than or equal to 0"),
        ({"ema_decay": "1"}, "ema_decay"),
        ({"ssl_method": "mean_techer"}, r"did you mean 'mean_teacher'\?"),
        ({"network": "vnett"}, "did you mean 'vnet"),
        ({"recipe": "aslsegg"}, "did you mean 'aslseg'"),
        ({"sam_prompts": "box+points"}, "did you mean 'point'"),
        ({"spacing": "1,2"}, "three positive numbers"),
        ({"spacing": "1,2,x"}, "three positive numbers"),
        ({"patch": "0,16,16"}, "three positive numbers"),
        ({"window_low": "300"}, "must lie below window_high"),
        ({"labels": "a,a"}, "different names"),
        ({"labels": ""}, "different names"),
        ({"promote_threshold": "much"}, "'much' is not a number"),
        ({"promote_threshold": "1.2"}, r"outside 0\.\.1"),
        ({"promote_threshold": "nan"}, r"outside 0\.\.1"),
        ({"modality": "us"}, "modality"),
    ],
)
def test_values_that_cannot_be(conf, message):
    with pytest.raises(BadSettingsError, match=message):
        load(conf)


def test_all_mistakes_of_values_are_told_at_once():
    with pytest.raises(BadSettingsError, match=r"(?s)seed.*threads|threads.*seed"):
        load({"seed": "x", "threads": "y"})


def test_settings_are_frozen():
    settings, _ = load()
    with pytest.raises(ValidationError):
        settings.seed = 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.8", {"liver": 0.8, "tumour": 0.8}),
        ("0.9,tumour=0.7", {"liver": 0.9, "tumour": 0.7}),
        ("tumour=0.5, 0.6", {"liver": 0.6, "tumour": 0.5}),
        ("0,spleen=1", {"liver": 0.0, "tumour": 0.0}),
    ],
)
def test_thresholds_by_label(text, expected):
    assert Settings(promote_threshold=text).thresholds == expected


def test_direct_construction_ignores_the_environment(monkeypatch):
    monkeypatch.setenv("ASLSEG_SEED", "5")
    assert Settings().seed == 1337


def test_paths_of_a_folder(tmp_path):
    paths = Paths(Settings(model_dir=str(tmp_path / "models")), tmp_path / "studies")
    assert paths.studies == tmp_path / "studies"
    assert paths.ledger == tmp_path / "studies" / ".aslseg" / "ledger.sqlite"
    assert paths.models == tmp_path / "models"


def test_paths_of_two_folders_of_one_name_differ(tmp_path):
    settings = Settings()
    assert Paths(settings, tmp_path / "a" / "x").models.parent == app_dir() / "model"
    assert Paths(settings, tmp_path / "a" / "x").models != Paths(settings, tmp_path / "b" / "x").models
    assert Paths(settings, tmp_path / "a" / "x").models == Paths(settings, tmp_path / "b" / ".." / "a" / "x").models


def test_paths_of_a_dicomweb_address(tmp_path):
    paths = Paths(Settings(), "http://127.0.0.1:8042/dicom-web")
    assert paths.studies is None
    assert paths.models.name.startswith("127.0.0.1-8042-")
    assert paths.ledger.is_relative_to(paths.models)
    assert Paths(Settings(model_dir=str(tmp_path)), "http://127.0.0.1:8042/dicom-web").models == tmp_path
    assert Paths(Settings(home=str(tmp_path / "h")), "http://x").cache == tmp_path / "h" / "cache"


def test_groups_name_existing_settings_once() -> None:
    names = [n for group in GROUPS.values() for n in group]
    assert set(names) <= set(Settings.model_fields)
    # flips are trained with and predicted with; a SAM setting may be where a file lies
    assert sorted(n for n in set(names) if names.count(n) > 1) == ["flips"]


def test_a_step_depends_on_its_settings_and_on_no_other() -> None:
    def seen(**conf: Any) -> dict[str, Any]:
        return relevant(Settings(**conf), "ssl")

    base = seen()
    assert seen(sam_iterations=5, gate_tolerance=0.5, threads=3, home="/x", adapter_iterations=1) == base
    assert seen(click_seconds=3, embed_cases=0, use_ssl=False, grow_iou=0.1, positive_points=2, sam_base="/b") == base
    for changed in (
        {"learning_rate": 0.5},
        {"flips": True},
        {"seed": 3},
        {"labels": "liver"},
        {"window_low": -50},
        {"patch": "32,32,32"},
    ):
        assert seen(**changed) != base
