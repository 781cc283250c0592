"""An Orthanc of our own with one phantom in it."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import requests

ROOT = Path(__file__).resolve().parents[2]
CT_STORAGE = "1.2.840.10008.5.1.4.1.1.2"


@dataclass(frozen=True)
class Pacs:
    """Where it is, what is in it, and the file that it was made from."""

    url: str
    study: str
    series: str
    scan: Path


def dicom_series(scan: Path, study: str, series: str) -> Iterator[bytes]:
    """A NIfTI scan as axial CT slices, DICOM files one after the other."""
    from io import BytesIO

    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    image = nib.load(scan)
    array = np.asarray(image.dataobj).astype(np.int16)
    lps = np.diag([-1, -1, 1, 1]) @ image.affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    frame = generate_uid()
    for k in range(array.shape[2]):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CT_STORAGE, generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        d = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        d.is_little_endian, d.is_implicit_VR = True, False
        d.SOPClassUID, d.SOPInstanceUID = CT_STORAGE, meta.MediaStorageSOPInstanceUID
        d.StudyInstanceUID, d.SeriesInstanceUID, d.FrameOfReferenceUID = study, series, frame
        d.PatientID, d.PatientName, d.PatientBirthDate, d.PatientSex = "phantom", "Phantom", "", "O"
        d.StudyDate, d.StudyTime, d.StudyID = "20250101", "120000", "1"
        d.AccessionNumber, d.ReferringPhysicianName = "1", ""
        d.Modality, d.SeriesNumber, d.InstanceNumber, d.SeriesDescription = "CT", 1, k + 1, "phantom"
        d.ImageType, d.Manufacturer = ["ORIGINAL", "PRIMARY", "AXIAL"], "ASLseg"
        d.ImagePositionPatient = [f"{v:.8g}" for v in (lps @ [0, 0, k, 1])[:3]]
        d.ImageOrientationPatient = [f"{v:.8g}" for v in (*(lps[:3, 0] / spacing[0]), *(lps[:3, 1] / spacing[1]))]
        d.PixelSpacing, d.SliceThickness = [f"{spacing[1]:.8g}", f"{spacing[0]:.8g}"], f"{spacing[2]:.8g}"
        d.Rows, d.Columns, d.SamplesPerPixel, d.PhotometricInterpretation = (
            *array.shape[1::-1],
            1,
            "MONOCHROME2",
        )
        d.BitsAllocated, d.BitsStored, d.HighBit, d.PixelRepresentation = 16, 16, 15, 1
        d.RescaleIntercept, d.RescaleSlope, d.RescaleType, d.WindowCenter, d.WindowWidth = (
            "0",
            "1",
            "HU",
            "40",
            "400",
        )
        d.PixelData = np.ascontiguousarray(array[:, :, k].T).tobytes()
        file = BytesIO()
        d.save_as(file, write_like_original=False)
        yield file.getvalue()


@pytest.fixture(scope="session")
def orthanc(tmp_path_factory: pytest.TempPathFactory, ports: Callable[[], int]) -> Iterator[Pacs]:
    """Orthanc with DICOMweb on a free port of 127.0.0.1."""
    from pydicom.uid import generate_uid

    from aslseg.volume.phantom import write_studies

    if not shutil.which("Orthanc", path="/usr/sbin:/usr/bin:/usr/local/bin"):
        pytest.skip("Orthanc is not installed: apt-get install orthanc orthanc-dicomweb")
    if not any(Path("/usr").glob("*/orthanc/**/libOrthancDicomWeb.so*")):
        pytest.skip("Orthanc's DICOMweb plugin is not installed: apt-get install orthanc-dicomweb")
    folder = tmp_path_factory.mktemp("orthanc")
    http, dicom = ports(), ports()
    command = ["bash", str(ROOT / "scripts" / "orthanc.sh"), str(folder / "db"), str(http), str(dicom)]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        url, end = f"http://127.0.0.1:{http}", time.monotonic() + 60
        while True:
            try:
                requests.get(f"{url}/system", timeout=5).raise_for_status()
                break
            except requests.RequestException:
                assert process.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < end, (folder / "log").read_text()
                time.sleep(0.2)
        write_studies(folder / "studies", 1, 0, 7, shape=(56, 48, 24))
        scan = folder / "studies" / "phantom_000.nii.gz"
        study, series = generate_uid(), generate_uid()
        for content in dicom_series(scan, study, series):
            requests.post(f"{url}/instances", data=content, timeout=30).raise_for_status()
        yield Pacs(f"{url}/dicom-web", study, series, scan)
    finally:
        process.terminate()
        process.wait(20)
