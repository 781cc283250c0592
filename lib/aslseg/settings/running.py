"""Settings of the server, of rounds and of the machine."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from aslseg.registry import RECIPES
from aslseg.settings.base import Auto, Section, setting
from aslseg.settings.values import (
    AutoLabelThresholds,
    AutoThresholds,
    DeviceName,
    FolderName,
    HttpAddress,
    LabelThresholds,
    Thresholds,
    Windows,
    ZoneName,
    registered,
)

# torch's generators are seeded with this number times about a million, plus the step, which must fit into 64 bits
LARGEST_SEED = 2**32 - 1


class ClickSettings(Section):
    """Clicks."""

    use_ssl: bool = setting(
        True,
        "Whether clicks repair the automatic mask of the SSL network where there is one, or start from nothing",
        example="false",
        common=True,
    )
    first_click_seconds: float = setting(
        2.2,
        "Time after which the server answers the first click on an object with the slices done so far, mostly all of "
        "them; the rest follows in later answers",
        unit="s",
        example="0.5",
        ge=0,
    )
    click_seconds: float = setting(
        0.08,
        "Time after which the server answers every further click on an object with the slices done so far",
        unit="s",
        example="1",
        ge=0,
    )
    prefetch_slices: int = setting(
        8,
        "Slices on each side of a click that SAM's image encoder processes in the background",
        unit="slices",
        example="16",
        ge=0,
    )
    embedding_memory_mb: float = setting(500, "Memory for SAM's image embeddings", unit="MB", example="2000", ge=0)
    embedding_disk_gb: float = setting(
        5, "Disk space for SAM's image embeddings; 0: none are stored", unit="GB", example="20", ge=0
    )
    embed_cases: int = setting(
        0,
        "Scans whose SAM embeddings are computed after a round, in the order in which annotators will get them",
        unit="scans",
        example="10",
        ge=0,
    )


class RoundSettings(Section):
    """Rounds."""

    recipe: Annotated[str, registered(RECIPES)] = setting(
        "aslseg",
        "Steps of a round: aslseg (SSL, SAM and adaptation network), or cfr (SAM on stitched slices); to compare "
        "with, for as many training steps as aslseg: self_training (the SSL network's own masks) and supervised (human "
        "labels alone)",
        example="cfr",
        common=True,
    )
    validation_fraction: float = setting(
        0.2,
        "Fraction of the labelled patients that nothing is trained on; they decide whether a new model is published",
        example="0.3",
        common=True,
        ge=0,
        lt=1,
    )
    label_folds: Auto | Annotated[int, Field(ge=0)] = setting(
        "auto",
        "Parts into which a round splits the labelled patients: a model is trained without each part and scored on it, "
        "and the mean of all models is one more source of masks. It takes up to twice the time of the SSL training "
        "whenever labels have changed, more with more than four parts; auto: 4, or as many as there are patients; 0: "
        "none",
        example="0",
    )
    folds_at_once: Auto | Annotated[int, Field(ge=1)] = setting(
        "auto",
        "Models of label_folds that are trained at a time, each in a process of its own with its share of threads; "
        "auto: on a CPU one for each thread, as far as memory allows, on a GPU one after the other",
        unit="models",
        example="1",
    )
    promote_threshold: LabelThresholds = setting(
        Thresholds(0.9, (("tumour", 0.7),)),
        "Least agreement of SSL and adaptation network at which a machine mask is promoted to train on: a number for "
        "all labels, then exceptions label=number",
        unit="Dice",
        example="0.85,tumour=0.6",
        common=True,
    )
    promote_target: AutoLabelThresholds = setting(
        AutoThresholds(),
        "Mean true Dice of the promoted masks that a round must be able to promise, once there are audits, in place of "
        "promote_threshold: auto (0.85, and 0.7 for labels that lie in another one) or a number for all labels, then "
        "exceptions label=number; 0: nothing is promised, and promote_threshold decides",
        unit="Dice",
        example="auto,tumour=0.6",
        common=True,
    )
    promote_confidence: float = setting(
        0.9,
        "Probability with which the promoted masks shall reach promote_target",
        example="0.95",
        ge=0.5,
        lt=1,
    )
    audits: int = setting(
        3,
        "Promoted scans that are drawn at random after each round for a person to label, by the strategy audit; 0: "
        "none, and nothing can be promised",
        unit="scans",
        example="5",
        common=True,
        ge=0,
    )
    promote_floor: AutoLabelThresholds = setting(
        AutoThresholds(),
        "Least mean Dice on human labels that were not trained on at which a label is promoted at all, whatever the "
        "agreement: auto (promote_target minus 0.05, at least 0.5) or a number for all labels, then exceptions "
        "label=number; 0: none is asked",
        unit="Dice",
        example="auto,tumour=0.5",
        common=True,
    )
    promote_fraction: float = setting(
        0.5,
        "Largest fraction of the unlabelled scans that one round promotes",
        example="0.3",
        common=True,
        ge=0,
        le=1,
    )
    promote_cases: int = setting(
        0, "Most scans that one round promotes; 0: as many as promote_fraction allows", unit="scans", example="50", ge=0
    )
    promote_empty: float = setting(
        0.2,
        "Largest fraction of a round's promoted scans in which both networks find nothing of a label, for each label",
        example="0.1",
        ge=0,
        le=1,
    )
    promote_weight: float = setting(
        0.5, "Weight of a promoted scan in the training loss; a scan labelled by a human has 1", example="1", ge=0, le=1
    )
    disagreement_weight: float = setting(
        0.3,
        "Weight, within a promoted scan, of voxels on which SSL and adaptation network disagree; the others have 1",
        example="0",
        ge=0,
        le=1,
    )
    round_disk_gb: float = setting(
        0,
        "Most disk space that the files of rounds and their caches may take; with more, nothing is trained or "
        "predicted; 0: no limit",
        unit="GB",
        example="200",
        ge=0,
    )
    uncertainty_weight: float = setting(
        1.0,
        "Weight, within a promoted scan, of voxels whose probability p is 0.5; it rises with the distance of p "
        "from 0.5, to 1 where p is 0 or 1. 1: all weigh the same",
        example="0.1",
        ge=0,
        le=1,
    )
    retrain_from: Literal["ssl", "scratch"] = setting(
        "ssl",
        "What the SSL network starts from when it is trained again with promoted masks: ssl, the model that was "
        "trained without them; scratch, random weights",
        example="scratch",
    )
    gate_tolerance: float = setting(
        0.0,
        "By how much a model's validation Dice may be lower than the published one's where settings alone have "
        "changed; new labels and promoted masks have rules of their own (docs/nights.md)",
        unit="Dice",
        example="0.005",
        ge=0,
        le=1,
    )
    keep_models: int = setting(
        3,
        "Published models of each kind that are kept to go back to, the newest; those that a rollback of the last five "
        "rounds needs are kept in any case",
        unit="models",
        example="10",
        ge=1,
    )
    first_round: bool = setting(
        True,
        "Whether the server starts a round by itself when it has labels and no published model",
        example="false",
        common=True,
    )
    report_webhook: HttpAddress = setting(
        "",
        "Address to which the headline of each round's report, or that a night failed, is sent as JSON; empty: nothing "
        "is sent",
        unit="address",
        example="https://chat.hospital.example/hooks/aslseg",
    )


class NightSettings(Section):
    """Nights."""

    night: Windows = setting(
        (),
        "When the server runs rounds by itself (docs/nights.md): HH:MM-HH:MM, days before it if wanted, several with "
        "commas between them; empty: never",
        example="mon-fri 22:00-06:00",
        common=True,
    )
    after_labels: int = setting(
        0,
        "New human labels after which the server runs a round by itself, whatever the time; 0: never",
        unit="labels",
        example="5",
        common=True,
        ge=0,
    )
    time_zone: ZoneName = setting(
        "",
        "Time zone of night and of the times that are shown; empty: that of the machine",
        example="Europe/Berlin",
    )
    night_hours: float = setting(
        0, "Longest time that a night's round may take; 0: until the window closes", unit="h", example="4", ge=0
    )


class MachineSettings(Section):
    """Machine and folders."""

    device: DeviceName = setting(
        "auto",
        "Where networks are computed: cpu, cuda, cuda:N for the GPU with that number, or auto, a GPU if there is one",
        example="cuda:1",
        common=True,
    )
    training_memory_gb: float = setting(
        4.0,
        "Memory for prepared scans during training; further scans are read from disk",
        unit="GB",
        example="16",
        common=True,
        ge=0,
    )
    compile: bool = setting(
        False,
        "Whether the SSL networks are compiled for training (torch.compile); needs a C++ compiler",
        example="true",
    )
    tracking: Literal["none", "tensorboard", "mlflow", "tensorboard+mlflow"] = setting(
        "none",
        "Program whose files the training curves are written to, in the folder tracking in home",
        example="tensorboard",
    )
    threads: int = setting(0, "CPU threads; 0: all cores", unit="threads", example="4", common=True, ge=0)
    seed: int = setting(
        1337, "Seed of every random generator of a training", example="1", common=True, ge=0, le=LARGEST_SEED
    )
    home: FolderName = setting(
        "",
        "Folder for the ledger, the files of rounds and caches; empty: .aslseg in the studies folder",
        unit="folder",
        example="/data/aslseg",
        common=True,
    )
    model_dir: FolderName = setting(
        "",
        "Folder of the published models, one of each kind: servers on the same task may share it, another organ needs "
        "another one; empty: one per studies folder, below the app's own",
        unit="folder",
        example="/data/models",
        common=True,
    )
    min_free_gb: float = setting(
        1.0, "Least free disk space; with less, nothing is written", unit="GB", example="10", ge=0
    )
