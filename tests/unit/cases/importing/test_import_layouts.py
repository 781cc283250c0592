"""Every layout finds its scans and its labels, and no other layout takes its folder."""

from __future__ import annotations

import pytest

from aslseg.cases.importing.plan import Options
from aslseg.errors import BadSettingsError, NotEnoughCasesError
from aslseg.registry import LAYOUTS
from foreign_folders import label, scan, write_json
from synthetic_dicom import CORONAL, make_series, write_series


def make_msd(root):
    for n in range(2):
        scan(root / "imagesTr" / f"liver_{n}.nii.gz", n)
        label(root / "labelsTr" / f"liver_{n}.nii.gz", 1, 2)
    scan(root / "imagesTs" / "liver_2.nii.gz", 2)
    (root / "imagesTr" / "._liver_0.nii.gz").write_bytes(b"left by macOS")
    write_json(root / "dataset.json", {"labels": {"0": "background", "1": "Tumour", "2": "liver"}})
    return {"liver_0": [2, 1], "liver_1": [2, 1], "liver_2": None}


def make_nnunet(root):
    scan(root / "imagesTr" / "case_1_0000.nii.gz")
    label(root / "labelsTr" / "case_1.nii.gz", 1, 2)
    scan(root / "imagesTs" / "case_2_0000.nii.gz", 1)
    write_json(root / "dataset.json", {"labels": {"background": 0, "liver": 1, "tumour": 2}, "file_ending": ".nii.gz"})
    return {"case_1": [1, 2], "case_2": None}


def make_bids(root):
    for sub in ("01", "02"):
        name = f"sub-{sub}_ses-a_ct"
        scan(root / f"sub-{sub}" / "ses-a" / "ct" / f"{name}.nii.gz", int(sub))
    derived = root / "derivatives" / "manual" / "sub-01" / "ses-a" / "ct"
    label(derived / "sub-01_ses-a_desc-manual_dseg.nii.gz", 5, 7)
    (derived / "sub-01_ses-a_desc-manual_dseg.tsv").write_text("index\tname\n0\tBackground\n5\tLiver\n7\tTumour\n")
    return {"sub-01_ses-a": [1, 2], "sub-02_ses-a": None}


def make_lits(root):
    scan(root / "batch 1" / "volume-0.nii", 0)
    label(root / "batch 1" / "segmentation-0.nii", 1, 2)
    scan(root / "batch 2" / "volume-10.nii", 1)
    label(root / "batch 2" / "segmentation-10.nii", 1)
    scan(root / "test" / "test-volume-0.nii", 2)
    return {"volume-0": [1, 2], "volume-10": [1, 0], "test-volume-0": None}


def make_two_folders(root):
    scan(root / "images" / "a_ct.nii.gz", 0)
    scan(root / "images" / "b_ct.nii.gz", 1)
    label(root / "Masks" / "a_mask.nii.gz", 1, 2)
    return {"a_ct": [1, 2], "b_ct": None}


def make_case_folders(root):
    scan(root / "s1" / "ct.nii.gz", 0)
    label(root / "s1" / "segmentations" / "liver.nii.gz", 1, 1)
    label(root / "s1" / "segmentations" / "tumour.nii.gz", 0, 1)
    scan(root / "s2" / "ct.nii.gz", 1)
    label(root / "s2" / "mask.nii.gz", 2)
    return {"s1": [1, 2], "s2": [2, 0]}


def make_beside(root):
    for n, word in enumerate(("_seg", "_label", "-mask", "_segmentation", " Labels")):
        scan(root / f"case{n}.nii.gz", n)
        label(root / f"case{n}{word}.nii.gz", 1)
    scan(root / "case9.nii.gz", 9)
    return {f"case{n}": [1, 0] for n in range(5)} | {"case9": None}


def make_flat(root):
    scan(root / "anna 1.nii.gz", 0)
    scan(root / "ben.nii.gz", 1)
    label(root / "labels" / "final" / "ben.nii.gz", 2)
    return {"anna_1": None, "ben": [2, 0]}


MAKERS = {
    "msd": make_msd,
    "nnunet": make_nnunet,
    "bids": make_bids,
    "lits": make_lits,
    "two_folders": make_two_folders,
    "case_folders": make_case_folders,
    "beside": make_beside,
    "flat": make_flat,
}


@pytest.mark.parametrize("name", MAKERS)
def test_scans_and_labels_are_found_and_labels_get_the_configured_values(importing, name):
    expected = MAKERS[name](importing.source)
    assert importing.plan().layout == LAYOUTS.get(name).title
    done = importing.run()
    assert {d.case for d in done} == set(expected)
    assert [d.notes for d in done if d.notes] == []
    assert {d.case for d in done if d.label == "written"} == {c for c, values in expected.items() if values}
    for case, values in expected.items():
        if values:
            assert importing.final(case)[:2] == values, case


def test_every_layout_has_a_test():
    assert set(LAYOUTS) == {*MAKERS, "dicom"}


def test_dicom_series_are_scans_by_their_uid(importing):
    first, second = make_series(6), make_series(5, PatientID="T2")
    scout = make_series(2, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"], SeriesDescription="scout")
    write_series(importing.source / "anna" / "series", first)
    write_series(importing.source / "mixed", second, "a")
    write_series(importing.source / "mixed", scout, "b")
    write_series(importing.source / "mixed", make_series(4, Modality="MR", SeriesDescription="T2 haste"), "c")
    plan = importing.plan()
    assert len(plan.pairs) == 2
    assert sorted(plan.passed_over) == ["series T2 haste: MR, but modality = ct", "series scout: a localizer"]
    done = importing.run()
    assert [d.scan for d in done] == ["written", "written"]
    lines = (importing.studies / "patients.csv").read_text().splitlines()
    assert len({line.split(",")[1] for line in lines[1:]}) == 2


def test_a_localizer_inside_a_series_is_left_out_with_a_note_and_a_gap_is_refused(importing):
    slices, broken = make_series(6), make_series(6, PatientID="T2")
    localizer = make_series(1, orientation=CORONAL, like=slices[0])
    write_series(importing.source / "a", localizer + slices)
    write_series(importing.source / "b", broken[:2] + broken[3:])
    done = sorted(importing.run(), key=lambda d: d.scan)
    assert [d.scan for d in done] == ["failed", "written"]
    assert "slices are missing: 1" in done[0].notes[0]
    assert "localizer" in done[1].notes[0]
    assert len(list(importing.studies.glob("*.nii.gz"))) == 1


def test_a_damaged_dicom_file_is_said_and_the_others_are_imported(importing):
    write_series(importing.source / "a", make_series(6))
    (importing.source / "a" / "im999.dcm").write_bytes(b"")
    plan = importing.plan()
    assert plan.passed_over == ["a/im999.dcm: not readable as DICOM; copy or export it again"]
    assert importing.run()[0].scan == "written"


def test_label_without_a_scan_is_said(importing):
    make_two_folders(importing.source)
    label(importing.source / "Masks" / "zoe_mask.nii.gz", 1)
    assert importing.plan().passed_over == ["zoe_mask.nii.gz: a label, but no scan is called 'zoe'"]


def test_several_channels_are_asked_about_and_chosen_by_a_pattern(importing):
    make_nnunet(importing.source)
    scan(importing.source / "imagesTr" / "case_1_0001.nii.gz", 5)
    (question,) = importing.plan().questions
    assert "'case_1'" in str(question)
    assert str(question).endswith("write --only '*_0000.nii.gz'")
    assert importing.run(Options(only="*_0000.nii.gz"))[0].scan == "written"


def test_several_contrasts_are_asked_about(importing):
    for suffix in ("T1w", "T2w"):
        scan(importing.source / "sub-01" / "anat" / f"sub-01_{suffix}.nii.gz")
    (question,) = importing.plan(modality="mr").questions
    assert str(question).endswith("write --only '*_T1w.nii.gz'")


def test_two_label_maps_of_a_scan_are_asked_about(importing):
    make_bids(importing.source)
    label(importing.source / "derivatives" / "auto" / "sub-01" / "ct" / "sub-01_ses-a_desc-auto_dseg.nii.gz", 5)
    (question,) = importing.plan().questions
    assert question.option == "--labels"
    assert importing.run(Options(labels="derivatives/manual/*"))[0].label == "written"


@pytest.mark.parametrize(("only", "case"), [("*_ct.nii.gz", "a_ct"), ("*_mr.nii.gz", "a_mr")])
@pytest.mark.parametrize("folders", [("", ""), ("images", "labels")])
def test_a_label_that_may_be_of_two_scans_is_asked_about(importing, only, case, folders):
    scan(importing.source / folders[0] / "a_ct.nii.gz", 0)
    scan(importing.source / folders[0] / "a_mr.nii.gz", 1)
    label(importing.source / folders[1] / "a_seg.nii.gz", 1)
    (question,) = importing.plan().questions
    assert "1 label may be of several scans" in str(question)
    assert str(question).endswith("write --only '*_ct.nii.gz'")
    assert [(d.case, d.label) for d in importing.run(Options(only=only))] == [(case, "written")]


def test_two_scans_whose_labels_name_them_exactly_are_no_question(importing):
    for word in ("ct", "mr"):
        scan(importing.source / f"a_{word}.nii.gz")
        label(importing.source / f"a_{word}_seg.nii.gz", 1)
    assert {d.case: d.label for d in importing.run()} == {"a_ct": "written", "a_mr": "written"}


def test_scans_of_one_name_keep_its_label_whichever_is_chosen(importing):
    for ending in (".nii", ".nii.gz"):
        scan(importing.source / f"a{ending}")
    label(importing.source / "a_seg.nii.gz", 1)
    (question,) = importing.plan().questions
    assert "'a'" in str(question)
    for pattern in ("a.nii", "a.nii.gz"):
        assert importing.plan(Options(only=pattern)).pairs[0].labels != ()


def test_a_number_that_lits_has_twice_is_asked_about(importing):
    for batch in "12":
        scan(importing.source / batch / "volume-0.nii", int(batch))
        label(importing.source / batch / "segmentation-0.nii", int(batch))
    assert [q.option for q in importing.plan().questions] == ["--only", "--labels"]
    importing.run(Options(only="2/*", labels="2/*"))
    assert importing.final("volume-0")[:2] == [2, 0]


def test_a_folder_without_scans_names_the_layouts(importing):
    (importing.source / "notes.txt").write_text("nothing")
    with pytest.raises(NotEnoughCasesError, match="nnU-Net"):
        importing.plan()


def test_a_layout_can_be_named(importing):
    make_lits(importing.source)
    for path in (importing.source / "batch 1").iterdir():
        path.rename(importing.source / path.name)
    assert {p.case for p in importing.plan(Options(layout="flat")).pairs} == {"volume-0", "segmentation-0"}
    with pytest.raises(BadSettingsError, match="unknown layout 'litz'; did you mean 'lits'"):
        importing.plan(Options(layout="litz"))


def test_a_damaged_dataset_json_is_said(importing):
    make_msd(importing.source)
    (importing.source / "dataset.json").write_text("{")
    with pytest.raises(BadSettingsError, match=r"dataset\.json"):
        importing.plan()
