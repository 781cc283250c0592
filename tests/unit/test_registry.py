import pytest

from aslseg.errors import BadSettingsError
from aslseg.registry import NETWORKS, RECIPES, SSL_METHODS, Registry, suggest


@pytest.mark.parametrize("registry", [SSL_METHODS, NETWORKS, RECIPES], ids=lambda r: r.kind)
def test_every_entry_can_be_imported(registry):
    for name in registry:
        assert callable(registry.get(name)), name


def test_names_are_listed_and_found():
    registry = Registry("thing", {"path": "pathlib:Path"})
    assert list(registry) == ["path"]
    assert "path" in registry
    assert "other" not in registry
    assert registry.get("path").__name__ == "Path"


def test_unknown_name_gets_the_nearest_one():
    with pytest.raises(BadSettingsError, match=r"unknown ssl method 'mean_techer'; did you mean 'mean_teacher'\?"):
        SSL_METHODS.get("mean_techer")


def test_far_off_names_get_all_of_them():
    assert suggest("zzz", ["b", "a"]) == "valid names are: a, b"
