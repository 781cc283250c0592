import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from aslseg.compute.hardware import resolved
from aslseg.errors import BadSettingsError
from aslseg.resources import app_dir
from aslseg.settings import GROUPS, PLATFORM_KEYS, Paths, Settings, load_settings, relevant
from aslseg.settings.model import SECTIONS
from aslseg.settings.paths import require_writable
from aslseg.settings.sources import REMOVED, RENAMED, RENAMED_VALUES
from aslseg.types import RESERVED_NAMES

NO_FILE = Path("/nonexistent/.env")


def load(conf=None, env=None, dotenv=NO_FILE):
    return load_settings(conf, env or {}, dotenv)


def test_defaults_are_valid_and_described():
    settings, origin = load()
    assert set(origin.values()) == {"default"}
    for name, field in Settings.model_fields.items():
        assert field.description, name
        example = field.json_schema_extra["example"]
        assert example, name
        if name not in ("nested", "promote_threshold"):
            load({name: example})
    assert settings.label_set.names == ("liver", "tumour")


def test_conf_over_environment_over_dotenv(tmp_path):
    (tmp_path / ".env").write_text("ASLSEG_SEED=1\nASLSEG_THREADS=1\nASLSEG_LABELS=atrium\nOTHER=1\n")
    env = {"ASLSEG_SEED": "2", "ASLSEG_THREADS": "2", "PATH": "/bin"}
    settings, origin = load({"seed": "3"}, env, tmp_path / ".env")
    assert (settings.seed, settings.threads, settings.labels) == (3, 2, ("atrium",))
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
        ({"patch": "0,16,16"}, "three positive whole numbers"),
        ({"window_low": "300"}, "must lie below window_high"),
        ({"spacing": "1,nan,2"}, "three positive numbers x,y,z, got '1,nan,2'"),
        ({"spacing": "1,inf,2"}, "three positive numbers"),
        ({"patch": "native"}, "patch: expected auto or three positive whole numbers x,y,z, got 'native'"),
        ({"patch": "40.5,32,32"}, "whole numbers"),
        ({"device": "foo"}, "device: expected auto, cpu, cuda or cuda:N, got 'foo'"),
        ({"device": "cuda:"}, "device: expected"),
        ({"sam_prompts": ""}, "expected one or more of box, point, mask"),
        ({"window_low": "nan"}, "window_low: .*finite"),
        ({"click_seconds": "inf"}, "click_seconds: .*finite"),
        ({"patch_voxels": "nan"}, "patch_voxels: .*finite"),
        ({"seed": str(2**40)}, "seed: .*less than or equal"),
        ({"ssl_iterations": "many"}, "ssl_iterations: Input should be 'auto', or a valid integer.*got 'many'"),
        ({"ssl_iterations": "0"}, "ssl_iterations: .*greater than 0"),
        ({"labels": "a,a"}, "different names"),
        ({"labels": "Liver,liver"}, "different names"),
        ({"labels": "liver,points"}, "'points' has a meaning of its own in the clients"),
        ({"nested": "tumor:liver"}, r"nested: unknown label 'tumor'; did you mean 'tumour'\?"),
        ({"nested": "tumour:liver,cyst:liver"}, "nested: unknown label 'cyst'"),
        ({"promote_threshold": "0.9,tumor=0.6"}, r"unknown label 'tumor'; did you mean 'tumour'\?"),
        ({"promote_threshold": "0.9,0.8"}, "two numbers for all labels"),
        ({"promote_threshold": "0.9,liver=0.8,liver=0.7"}, "two numbers for liver"),
        ({"promote_floor": "auto,tumor=0.6"}, r"promote_floor: unknown label 'tumor'; did you mean 'tumour'\?"),
        ({"promote_floor": "auto,0.8"}, "auto and a number for all labels"),
        ({"promote_floor": "auto,auto"}, "auto stands there twice"),
        ({"promote_floor": "high"}, "'high' is not a number"),
        ({"label_folds": "some"}, "label_folds: Input should be 'auto', or a valid integer.*got 'some'"),
        ({"label_folds": "-1"}, "label_folds: .*greater than or equal to 0"),
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
        ("liver=0.5", {"liver": 0.5, "tumour": 0.9}),
    ],
)
def test_thresholds_by_label(text, expected):
    assert Settings(promote_threshold=text).thresholds == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("auto", {"liver": 0.8, "tumour": 0.65}),
        ("tumour=0.5", {"liver": 0.8, "tumour": 0.5}),
        ("auto,tumour=0.5", {"liver": 0.8, "tumour": 0.5}),
        ("0.6", {"liver": 0.6, "tumour": 0.6}),
        ("0.6, tumour=0", {"liver": 0.6, "tumour": 0.0}),
        ("0", {"liver": 0.0, "tumour": 0.0}),
    ],
)
def test_floors_by_label(text, expected):
    settings = Settings(promote_floor=text)
    assert settings.floors == expected
    assert Settings(**settings.model_dump()).floors == expected


def test_folds_are_four_unless_a_number_is_given():
    assert [Settings(label_folds=given).most_folds for given in ("auto", 0, "2")] == [4, 0, 2]


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


@pytest.fixture
def app_folder(tmp_path, monkeypatch):
    """Models go below this folder, not below the checkout's app."""
    monkeypatch.setenv("ASLSEG_APP_DIR", str(tmp_path / "app"))
    return tmp_path / "app"


def used(studies, **conf):
    """A studies folder from which something was published."""
    studies.mkdir(parents=True, exist_ok=True)
    paths = Paths(Settings(**conf), studies)
    paths.remember_models()
    return paths


def test_models_are_found_again_when_the_studies_folder_is_moved(tmp_path, app_folder):
    models = used(tmp_path / "old").models
    assert models.parent == app_folder / "model"
    (tmp_path / "disk").mkdir()
    (tmp_path / "old").rename(tmp_path / "disk" / "new name")
    moved = Paths(Settings(), tmp_path / "disk" / "new name")
    assert moved.models == models
    moved.remember_models()
    (tmp_path / "disk").rename(tmp_path / "disk2")
    assert Paths(Settings(), tmp_path / "disk2" / "new name").models == models, "a second time"


def test_a_folder_of_the_version_before_has_its_models_where_they_were(tmp_path, app_folder):
    """It has no models.json; the key is that of its absolute path."""
    studies = tmp_path / "studies"
    key = hashlib.sha256(str(studies).encode()).hexdigest()[:8]
    assert Paths(Settings(), studies).models == app_folder / "model" / f"studies-{key}"
    assert used(studies).models == app_folder / "model" / f"studies-{key}"


@pytest.mark.parametrize("home", ["", "state"])
def test_a_copy_of_a_studies_folder_has_models_of_its_own(tmp_path, app_folder, home):
    inside = lambda studies: {"home": str(studies / home)} if home else {}  # noqa: E731
    first = used(tmp_path / "a", **inside(tmp_path / "a"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    copied = Paths(Settings(**inside(tmp_path / "b")), tmp_path / "b")
    assert copied.models != first.models
    copied.remember_models()
    assert Paths(Settings(**inside(tmp_path / "b")), tmp_path / "b").models == copied.models
    assert Paths(Settings(**inside(tmp_path / "a")), tmp_path / "a").models == first.models


def test_a_home_elsewhere_follows_a_folder_that_was_moved(tmp_path, app_folder):
    conf = {"home": str(tmp_path / "home")}
    first = used(tmp_path / "a", **conf)
    (tmp_path / "b").mkdir()
    assert Paths(Settings(**conf), tmp_path / "b").models != first.models, "another folder with the same home"
    (tmp_path / "b").rmdir()
    (tmp_path / "a").rename(tmp_path / "b")
    assert Paths(Settings(**conf), tmp_path / "b").models == first.models


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"folder": "../../etc", "studies": "/x"}', '{"folder": "..", "studies": "/x"}', "\xff"]
)
def test_what_is_no_name_of_a_folder_is_passed_over(tmp_path, app_folder, text):
    studies = tmp_path / "studies"
    (studies / ".aslseg").mkdir(parents=True)
    plain = Paths(Settings(), studies).models
    (studies / ".aslseg" / "models.json").write_text(text, encoding="latin-1")
    assert Paths(Settings(), studies).models == plain


def test_a_model_dir_of_the_settings_is_used_as_it_is(tmp_path, app_folder):
    conf = {"model_dir": str(tmp_path / "models")}
    assert used(tmp_path / "a", **conf).models == tmp_path / "models"
    assert not (tmp_path / "a" / ".aslseg" / "models.json").exists()
    used(tmp_path / "a")
    assert Paths(Settings(**conf), tmp_path / "a").models == tmp_path / "models"


def test_groups_name_existing_settings_once() -> None:
    names = [n for group in GROUPS.values() for n in group]
    assert set(names) <= set(Settings.model_fields)
    # flips are trained with and predicted with; the relative view is every stage's; a SAM setting may be where a
    # file lies
    shared = ["flips", "nested_fraction", "nested_range", "nested_synthetic"]
    assert sorted(n for n in set(names) if names.count(n) > 1) == shared


def test_a_step_depends_on_its_settings_and_on_no_other() -> None:
    def seen(**conf: Any) -> dict[str, Any]:
        return relevant(Settings(**conf), "ssl")

    base = seen()
    assert seen(sam_iterations=5, gate_tolerance=0.5, threads=3, home="/x", adapter_iterations=1) == base
    assert seen(click_seconds=3, embed_cases=0, use_ssl=False, box_margin=2, sam_base="/b") == base
    for changed in (
        {"learning_rate": 0.5},
        {"flips": True},
        {"seed": 3},
        {"labels": "liver"},
        {"window_low": -50},
        {"patch": "32,32,32"},
    ):
        assert seen(**changed) != base


def test_defaults_for_other_labels_are_passed_over() -> None:
    settings, _ = load({"labels": "atrium"})
    assert settings.label_set.parents == (None,)
    assert settings.thresholds == {"atrium": 0.9}


def test_a_label_spelt_nearly_as_in_a_default_gives_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    load({"labels": "liver,tumor"})
    assert "labels has 'tumor', not the 'tumour'" in caplog.text
    caplog.clear()
    load({"labels": "liver,tumor", "nested": "tumor:liver", "promote_threshold": "0.9,tumor=0.7"})
    load({"labels": "atrium"})
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("labels", "a,b", ("a", "b")),
        ("nested", "tumour:liver", (("tumour", "liver"),)),
        ("nested", "", ()),
        ("spacing", "native", "native"),
        ("spacing", "1.5,1.5,2", (1.5, 1.5, 2.0)),
        ("spacing", "0.123456789,1,1", (0.123456789, 1.0, 1.0)),
        ("patch", "112,112,80", (112, 112, 80)),
        ("sam_prompts", "mask+box", ("mask", "box")),
    ],
)
def test_text_is_parsed_once_and_written_back_as_it_was(name: str, text: str, value: object) -> None:
    settings = load({name: text})[0]
    assert getattr(settings, name) == value
    assert settings.model_dump()[name] == text
    assert Settings(**settings.model_dump()) == settings


def test_labels_may_have_no_name_that_clients_use_otherwise() -> None:
    from aslseg.serving.params import REFUSED, InferenceParams

    words = {*REFUSED, *InferenceParams.model_fields}
    assert words <= RESERVED_NAMES


def test_old_names_are_read_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    settings, origin = load({"memory_gb": "3", "sam_train": "adapter"}, {"ASLSEG_GROW_IOU": "0.1"})
    assert (settings.training_memory_gb, settings.sam_train) == (3, "med2d_adapter")
    assert origin["training_memory_gb"] == "conf"
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING] == [
        "setting grow_iou in environment has no effect: its value is always 0.5 now",
        "setting memory_gb in conf has a new name: training_memory_gb",
        "sam_train = adapter in conf has a new name: sam_train = med2d_adapter",
    ]


def test_the_new_name_wins_over_the_old_one() -> None:
    assert load({"training_memory_gb": "3", "memory_gb": "2"})[0].training_memory_gb == 3
    assert load({"memory_gb": "2"}, {"ASLSEG_TRAINING_MEMORY_GB": "3"})[0].training_memory_gb == 2


def test_every_old_name_leads_to_a_setting_there_is() -> None:
    assert not (set(RENAMED) | set(REMOVED)) & set(Settings.model_fields)
    assert set(RENAMED.values()) <= set(Settings.model_fields)
    for (name, _), value in RENAMED_VALUES.items():
        load({name: value})


def test_steps_of_version_0_1_are_found_again() -> None:
    """Their inputs, written down by version 0.1 with its defaults; it had one network for all labels."""
    common = {
        **{"labels": "liver,tumour", "nested": "tumour:liver", "modality": "ct", "seed": 1337},
        **{"window_low": -160.0, "window_high": 240.0, "patch": "auto", "patch_voxels": 200000.0},
    }
    ssl = {
        **{"ssl_method": "bcp_mt", "network": "vnet_small", "batch_labelled": 2, "batch_unlabelled": 2},
        **{"accumulate": 1, "learning_rate": 0.01, "schedule": "poly", "consistency": "auto", "ema_decay": 0.99},
        **{"flips": False, "compile": False},
    }
    sam = {
        **{"flips": False, "sam_kind": "auto", "sam_image_size": 0, "sam_iterations": 300, "sam_batch": 8},
        **{"sam_learning_rate": 0.0002, "sam_train": "adapter", "sam_lora_rank": 4, "sam_canvas": 0},
    }
    prompts = {
        **{"sam_zoom": 5, "sam_prompts": "box+point+mask", "box_margin": 3.0, "min_component": 9},
        **{"positive_points": 1, "negative_points": 0},
    }
    adapter = {"adapter_iterations": 600, "adapter_learning_rate": 0.002}
    settings = resolved(Settings(device="cpu", sam_train="med2d_adapter", nested_fraction=0))
    for groups, expected in (
        (("ssl",), common | ssl),
        (("predict",), common | {"overlap": 0.5, "flips": False}),
        (("sam", "prompts"), common | sam | prompts),
        (("adapter", "prompts"), common | adapter | prompts),
    ):
        # as text, since 5 and 5.0 give different hashes
        assert json.dumps(relevant(settings, *groups), sort_keys=True) == json.dumps(expected, sort_keys=True)


def test_a_second_stage_of_another_version_is_another_step(monkeypatch: pytest.MonkeyPatch) -> None:
    nested, flat = Settings(), Settings(nested_fraction=0)
    before = {group: (relevant(nested, group), relevant(flat, group)) for group in GROUPS}
    monkeypatch.setattr("aslseg.settings.groups.SECOND_STAGE", 1)
    changed = {group for group, values in before.items() if relevant(nested, group) != values[0]}
    assert changed == {"ssl"}
    assert all(relevant(flat, group) == values[1] for group, values in before.items())


def test_folders_that_cannot_be_written_to_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    require_writable(Settings(home=str(tmp_path / "a" / "b")), "home", "model_dir")
    for name in ("home", "model_dir"):
        with pytest.raises(BadSettingsError, match=f"{name}: cannot write to .*file/x .*give a folder"):
            require_writable(Settings(**{name: str(tmp_path / "file" / "x")}), "home", "model_dir")


def test_every_setting_belongs_to_one_section() -> None:
    assert [name for section in SECTIONS for name in section.model_fields] == list(Settings.model_fields)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252", "utf-16"])
def test_a_dotenv_file_in_any_encoding(tmp_path, encoding):
    (tmp_path / ".env").write_bytes("# für die Leber\r\nASLSEG_LABELS=Läsion\r\n\r\n".encode(encoding))
    settings, origin = load_settings(env={}, dotenv=tmp_path / ".env")
    assert settings.label_set.names == ("Läsion",)
    assert origin["labels"] == ".env"


@pytest.mark.parametrize("group", ["ssl", "sam", "adapter"])
def test_every_stage_depends_on_the_relative_view_of_nested_labels_and_on_nothing_of_it_without(group: str) -> None:
    nested, flat = Settings(), Settings(labels=("liver",), nested=())
    for changed in ({"nested_range": 0.1}, {"nested_synthetic": 0.0}):
        assert relevant(nested, group) != relevant(nested.model_copy(update=changed), group)
        assert relevant(flat, group) == relevant(flat.model_copy(update=changed), group)
        assert relevant(nested, "prompts") == relevant(nested.model_copy(update=changed), "prompts")
