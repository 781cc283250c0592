import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from aslseg.cases.studies import read_studies
from aslseg.compute.overlap import dice
from aslseg.errors import BadSettingsError
from aslseg.types import Labels
from aslseg.volume.io import read_image, read_label
from aslseg.volume.phantom import Difficulty, make_phantom, write_studies

SMALL = (48, 48, 16)
LABELS = Labels.parse("liver,tumour", "tumour:liver")


def world(volume, mask):
    """Centre of a mask in RAS mm."""
    return nib.affines.apply_affine(volume.affine, np.argwhere(mask)).mean(0)


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_default_phantom_is_an_abdomen():
    scan, truth = make_phantom(0, 0)
    assert scan.array.shape == truth.shape == (96, 96, 32)
    assert scan.array.dtype == np.float32
    assert truth.dtype == np.uint8
    assert scan.spacing == pytest.approx((2, 2, 5), rel=0.05)
    assert scan.array[:3, :3].max() < -800, "air outside the body"
    liver = scan.array[truth == 1]
    assert 85 < np.median(liver) < 130
    assert np.mean((liver > 60) & (liver < 150)) > 0.85
    millilitres = (truth > 0).sum() * np.prod(scan.spacing) / 1000
    assert 200 < millilitres < 700
    # fat, soft tissue, bone
    for low, high in ((-130, -60), (30, 80), (180, 300)):
        assert np.mean((scan.array > low) & (scan.array < high)) > 0.005


@pytest.mark.parametrize("case", range(6))
def test_every_phantom_holds_what_it_promises(case):
    scan, truth = make_phantom(4, case, shape=SMALL)
    assert set(np.unique(truth)) == {0, 1, 2}
    liver = truth > 0
    _, pieces = ndimage.label(liver)
    assert pieces == 1, "the liver is one organ, the tumours lie inside it"
    assert 0.0005 < (truth == 2).sum() / liver.sum() < 0.6
    assert world(scan, liver)[0] > 10, "the liver is on the patient's right, +x in RAS"
    assert np.isfinite(scan.array).all()
    assert scan.array.min() >= -1024


def test_liver_is_on_the_right_in_both_stored_orientations():
    stored = {nib.aff2axcodes(make_phantom(4, case, shape=SMALL)[0].affine) for case in range(3)}
    assert stored == {("R", "A", "S"), ("L", "P", "S")}


def test_same_arguments_same_voxels_and_other_arguments_others():
    a, b = make_phantom(9, 1, shape=SMALL), make_phantom(9, 1, shape=SMALL)
    assert np.array_equal(a[0].array, b[0].array)
    assert np.array_equal(a[0].affine, b[0].affine)
    assert np.array_equal(a[1], b[1])
    for other in (make_phantom(9, 2, shape=SMALL), make_phantom(8, 1, shape=SMALL)):
        assert not np.array_equal(a[0].array, other[0].array)
        assert not np.array_equal(a[1], other[1])


def test_patients_differ_in_contrast_and_anatomy():
    pairs = [make_phantom(1, case, shape=SMALL) for case in range(0, 18, 3)]
    bases = [np.median(scan.array[truth == 1]) for scan, truth in pairs]
    assert np.ptp(bases) > 8
    assert len({scan.spacing for scan, _ in pairs}) == len(pairs)
    assert dice(pairs[0][1] > 0, pairs[1][1] > 0) < 0.95


def test_tumours_are_dark_bright_or_have_a_bright_rim():
    def contrast(difficulty):
        scan, truth = make_phantom(2, 3, difficulty=difficulty)
        return scan.array[truth == 2].mean() - scan.array[truth == 1].mean()

    dark = contrast(Difficulty(p_hyperdense=0, p_rim=0))
    bright = contrast(Difficulty(p_hyperdense=1, p_rim=0))
    assert dark < -10
    assert bright > 20
    assert contrast(Difficulty(p_hyperdense=0, p_rim=0, contrast=2)) < 1.5 * dark
    assert abs(contrast(Difficulty(p_hyperdense=0, p_rim=0, p_isodense=1))) < 0.5 * abs(dark)
    scan, truth = make_phantom(2, 3, difficulty=Difficulty(p_hyperdense=0, p_rim=1, contrast=2, noise=0))
    lesion = truth == 2
    core = ndimage.binary_erosion(lesion, np.ones((5, 5, 1)))
    rim = lesion & ~ndimage.binary_erosion(lesion, np.ones((3, 3, 1)))
    assert scan.array[rim].mean() > scan.array[core].mean() + 30


def test_difficulty_knobs():
    assert not (make_phantom(0, 0, shape=SMALL, difficulty=Difficulty(p_negative=1))[1] == 2).any()
    quiet, _ = make_phantom(0, 0, shape=SMALL, difficulty=Difficulty(noise=0))
    loud, _ = make_phantom(0, 0, shape=SMALL, difficulty=Difficulty(noise=2))
    assert np.std(loud.array[:4, :4]) > np.std(quiet.array[:4, :4]) + 5
    tiny = (24, 24, 8)
    plain = [make_phantom(0, c, shape=tiny)[0].array for c in range(20)]
    moved = [make_phantom(0, c, shape=tiny, difficulty=Difficulty(scanner_shift=15))[0].array for c in range(20)]
    steps = {round(float(np.median(m - p))) for m, p in zip(moved, plain, strict=True)}
    assert steps == {-15, 0, 15}


@pytest.mark.parametrize("shape", [(24, 24, 8), (40, 56, 10)])
def test_other_grids_cover_the_same_field(shape):
    scan, truth = make_phantom(0, 1, shape=shape)
    assert scan.array.shape == shape
    assert np.multiply(scan.spacing, shape) == pytest.approx((192, 192, 160), rel=0.05)
    assert (truth == 2).any()


@pytest.mark.parametrize("arguments", [{"shape": (8, 48, 16)}, {"shape": (48, 48)}, {"seed": -1}, {"case": -1}])
def test_impossible_phantoms(arguments):
    with pytest.raises(BadSettingsError, match="phantom"):
        make_phantom(**{"seed": 0, "case": 0, **arguments})


def test_studies_folder_and_hidden_truth(tmp_path):
    seen = []
    made = write_studies(
        tmp_path / "studies", 5, 2, 3, shape=(24, 24, 8), report=lambda done, total, **_: seen.append((done, total))
    )
    assert made["labelled"] == ["phantom_000", "phantom_001"]
    assert made["unlabelled"] == ["phantom_002", "phantom_003", "phantom_004"]
    assert seen[-1] == (5, 5)
    studies = read_studies(tmp_path / "studies")
    assert list(studies.images) == made["labelled"] + made["unlabelled"]
    assert list(studies.final) == made["labelled"]
    assert not studies.problems
    hidden = sorted(p.name for p in (tmp_path / "studies_truth").iterdir())
    assert hidden == [f"{case}.nii.gz" for case in made["unlabelled"]]
    # labels belong to their scans, whatever the stored orientation, and are what make_phantom gave
    for n, case in enumerate(made["unlabelled"], 2):
        scan = read_image(studies.images[case])
        stored = read_label(tmp_path / "studies_truth" / f"{case}.nii.gz", scan, LABELS)
        original, truth = make_phantom(3, n, shape=(24, 24, 8))
        assert np.array_equal(stored, truth)
        assert np.abs(scan.array - original.array).max() <= 0.5
        assert np.allclose(scan.affine, original.affine, atol=1e-4)


def test_same_seed_same_bytes(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_studies(tmp_path / name / "studies", 3, 1, 5, shape=(24, 24, 8))
    first, second = files(tmp_path / "a"), files(tmp_path / "b")
    assert len(first) == 6
    assert first == second
    write_studies(tmp_path / "c" / "studies", 3, 1, 6, shape=(24, 24, 8))
    assert files(tmp_path / "c") != first


@pytest.mark.parametrize(("cases", "labelled"), [(0, 0), (3, 4), (3, -1), (-1, 0)])
def test_impossible_numbers_write_nothing(tmp_path, cases, labelled):
    with pytest.raises(BadSettingsError, match="labelled"):
        write_studies(tmp_path / "studies", cases, labelled, 0)
    assert not any(tmp_path.iterdir())


def test_a_folder_in_use_is_left_alone(tmp_path):
    studies = tmp_path / "studies"
    write_studies(studies, 2, 1, 0, shape=(24, 24, 8))
    before = files(tmp_path)
    with pytest.raises(BadSettingsError, match="not empty"):
        write_studies(studies, 2, 1, 1, shape=(24, 24, 8))
    assert files(tmp_path) == before
    (studies / "patient.nii.gz").write_bytes(b"somebody's scan")
    with pytest.raises(BadSettingsError, match=r"more than phantoms.*nothing was deleted"):
        write_studies(studies, 2, 1, 1, shape=(24, 24, 8), overwrite=True)
    assert (studies / "patient.nii.gz").exists()


def test_overwriting_leaves_nothing_of_the_old_set(tmp_path):
    studies = tmp_path / "studies"
    write_studies(studies, 4, 3, 0, shape=(24, 24, 8))
    (studies / "labels" / "original").mkdir()
    (studies / "labels" / "original" / "phantom_003.nii.gz").write_bytes(b"x")
    (studies / "datastore_v2.json").write_text("{}")
    write_studies(studies, 2, 1, 0, shape=(24, 24, 8), overwrite=True)
    assert sorted(files(tmp_path)) == [
        "studies/labels/final/phantom_000.nii.gz",
        "studies/phantom_000.nii.gz",
        "studies/phantom_001.nii.gz",
        "studies_truth/phantom_001.nii.gz",
    ]


def test_all_labelled_and_overwrite_of_an_empty_truth(tmp_path):
    write_studies(tmp_path / "s", 2, 2, 0, shape=(24, 24, 8))
    assert not any((tmp_path / "s_truth").iterdir())
    write_studies(tmp_path / "s", 2, 0, 0, shape=(24, 24, 8), overwrite=True)
    assert len(list((tmp_path / "s_truth").iterdir())) == 2


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "s").write_text("x")
    with pytest.raises(BadSettingsError, match="is a file"):
        write_studies(tmp_path / "s", 1, 0, 0, overwrite=True)
