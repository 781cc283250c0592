"""Two rounds on the liver CTs of ../shared/data/lits, scored on a patient that was never seen.

Labelled: patients {0, 1} and {4}; evaluation truth: patient {6..10}, five scans kept out of the studies folder;
unlabelled: the rest. Nine labelled volumes of four patients show that the loop runs on real tumours, no more:

    python benchmarks/realdata_lits.py --out work/lits
"""

from __future__ import annotations

import shutil
from pathlib import Path

from realdata import Experiment, arguments_of, run_experiment

LABELLED, HELD_OUT, UNLABELLED = (0, 1, 4), (6, 7, 8, 9, 10), (5, 11, 12, 13)
# Patient 4 holds nearly all of the labelled tumour and must be trained on; the other labelled patient judges.
PATIENTS = {0: "00,validation", 1: "00,validation", 4: "04,train", 5: "05,", 11: "11,", 12: "12,", 13: "13,"}
CONF = {"labels": "liver,tumour", "modality": "ct", "max_working_voxels": "2e6", "promote_threshold": "0.85,tumour=0.5"}


def build(data: Path, out: Path) -> None:
    """Studies folder with patients.csv, held-out scans and the truths under ``out``."""
    folders = [out / "studies" / "labels" / "final", out / "truth", out / "heldout"]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    for number in (*LABELLED, *UNLABELLED, *HELD_OUT):
        name = f"lits_{number:02d}.nii.gz"
        shutil.copyfile(data / "images" / name, (out / ("heldout" if number in HELD_OUT else "studies")) / name)
        label = data / "labels" / name
        if label.exists():
            shutil.copyfile(label, folders[0 if number in LABELLED else 1] / name)
    rows = [f"lits_{number:02d},{patient_role}" for number, patient_role in PATIENTS.items()]
    (out / "studies" / "patients.csv").write_text("\n".join(["case,patient,role", *rows]) + "\n")


def main() -> None:
    arguments = arguments_of(__doc__, "lits")
    conf = CONF | dict(pair.split("=", 1) for pair in arguments.conf)
    if not (arguments.out / "heldout").exists():
        build(arguments.data, arguments.out)
    run_experiment(Experiment("lits", "Liver and liver tumour, CT", arguments.out, conf, arguments.rounds))


if __name__ == "__main__":
    main()
