from pathlib import Path

import pytest

from aslseg.cases.split import hash_fraction, split, validation_patients
from aslseg.cases.studies import Studies
from aslseg.errors import NotEnoughCasesError

MANY = [f"patient{n}" for n in range(200)]


def studies(images, final, patients=None, roles=None):
    paths = {c: Path(f"{c}.nii.gz") for c in sorted(images)}
    known = patients or {}
    return Studies(
        Path("studies"), paths, {c: paths[c] for c in final}, {c: known.get(c, c) for c in images}, roles or {}
    )


def test_hash_is_stable_across_machines_and_versions():
    assert hash_fraction("patient0") == pytest.approx(0.4259113, abs=1e-6)
    assert all(0 <= hash_fraction(p) < 1 for p in MANY)


def test_about_the_fraction_is_chosen():
    assert 25 <= len(validation_patients(MANY, 0.2, {})) <= 55
    assert validation_patients(MANY, 0.0, {}) == set()


def test_order_and_repetition_do_not_matter():
    assert validation_patients(MANY, 0.2, {}) == validation_patients([*reversed(MANY), *MANY], 0.2, {})


def test_a_patient_never_moves_when_others_are_added():
    few, all_of_them = validation_patients(MANY[:50], 0.2, {}), validation_patients(MANY, 0.2, {})
    assert few == {p for p in all_of_them if p in MANY[:50]}


def test_one_of_two_judges_even_if_no_hash_is_low_enough():
    chosen = validation_patients(["x", "y"], 1e-9, {})
    assert len(chosen) == 1
    assert chosen == {min("xy", key=hash_fraction)}


def test_a_judge_stays_a_judge_when_labels_arrive():
    first = validation_patients(["x", "y"], 1e-9, {})
    later = validation_patients(["x", "y", *MANY], 0.2, {}, before=first)
    assert first <= later


def test_one_patient_trains():
    assert validation_patients(["x"], 0.9, {}) == set()
    assert validation_patients([], 0.9, {}) == set()


def test_somebody_always_trains():
    for fraction in (0.5, 0.99):
        assert len(validation_patients(["x", "y", "z"], fraction, {})) < 3
    assert len(validation_patients(["x", "y"], 0.2, {}, before=["x", "y"])) == 1
    assert len(validation_patients(["x", "y"], 0.2, {"x": "validation", "y": "validation"})) == 1
    # the one that has not judged before is the one to train
    assert validation_patients(["x", "y"], 0.99, {}, before=["x"]) == {"x"}
    assert validation_patients(["x", "y"], 0.99, {}, before=["y"]) == {"y"}


def test_nobody_judges_who_was_trained_on():
    # one label, a round, a second label: whichever hash is lower, the second patient judges
    for first, second in (("x", "y"), ("y", "x"), ("patient3", "patient7"), ("patient7", "patient3")):
        for fraction in (1e-9, 0.2, 0.99):
            assert validation_patients([first, second], fraction, {}, trained={first}) == {second}
    assert validation_patients(["x", "y"], 0.99, {}, trained={"x", "y"}) == set()
    # a folder whose only judge was trained on gets another one with the next label
    assert validation_patients(["x", "y", "z"], 1e-9, {}, before={"x"}, trained={"x", "y"}) == {"x", "z"}
    found = split(studies(["a1", "a2", "b"], ["a1", "a2", "b"], {"a1": "A", "a2": "A"}), 0.5, trained=["a1"])
    assert {c.id for c in found if c.role == "validation"} == {"b"}


def test_the_table_overrules():
    roles = dict.fromkeys(MANY[:100], "train") | dict.fromkeys(MANY[100:], "validation")
    assert validation_patients(MANY, 0.2, roles) == set(MANY[100:])
    assert validation_patients(["x", "y"], 0.2, {"x": "train"}, before=["x"]) == {"y"}


def test_roles_by_patient():
    patients = {"a1": "A", "a2": "A", "b1": "B", "b2": "B", "c1": "C"}
    found = split(studies(patients, ["a1", "b1"], patients, {"A": "train", "B": "validation"}), 0.2)
    assert {c.id: c.role for c in found} == {
        "a1": "train",
        "a2": "unlabelled",
        "b1": "validation",
        "c1": "unlabelled",
    }
    assert all((c.label is None) == (c.role == "unlabelled") for c in found)
    assert [c.id for c in found] == sorted(c.id for c in found)


def test_a_judge_whose_labels_were_deleted_is_not_learned_from():
    """Its scans would be trained on and promoted, and it would judge models again once a label is saved."""
    patients = {"a1": "A", "b1": "B", "b2": "B", "c1": "C"}
    found = split(studies(patients, ["a1"], patients), 0.2, before={"B"})
    assert {c.id: c.role for c in found} == {"a1": "train", "c1": "unlabelled"}
    found = split(studies(patients, ["a1"], patients, {"B": "train"}), 0.2, before={"B"})
    assert {c.id for c in found} == set(patients), "patients.csv overrules"


def test_no_patient_on_both_sides():
    images = [f"case{n}" for n in range(120)]
    patients = {c: f"p{int(c[4:]) % 40}" for c in images}
    found = split(studies(images, images[:80], patients), 0.3)
    judges = {c.patient for c in found if c.role == "validation"}
    learned = {c.patient for c in found if c.role != "validation"}
    assert judges
    assert learned
    assert not judges & learned


def test_no_label_at_all():
    with pytest.raises(NotEnoughCasesError, match="draw at least one label"):
        split(studies(["a"], []), 0.2)
