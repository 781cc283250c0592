"""The smallest round there is: phantoms of 24 x 24 x 8 voxels, a SAM of 32 pixels, a handful of steps. Two seconds."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from monai.networks.nets import UNet
from torch import nn

from aslseg.compute.weights import save_weights
from aslseg.errors import TrainingDivergedError
from aslseg.files import sha256
from aslseg.sam.modeling.architecture import Architecture, build
from aslseg.settings import Paths, Settings
from aslseg.volume.phantom import write_studies

SHAPE = (24, 24, 8)
Judged = Callable[[Callable[[str], float]], None]
"""The fixture ``judged``."""


@dataclass(frozen=True)
class Learned:
    """Ids of the cases that an SSL model has learned from."""

    human: frozenset[str]
    promoted: frozenset[str]


Training = tuple[dict[str, Any], dict[str, Any]]
"""Human and promoted cases of a training, by id; from the fixture ``trainings``."""
Scored = Callable[[Callable[[Learned, str], float]], None]
"""The fixture ``scored``."""
SAM = Architecture(
    image_size=32, patch_size=8, embed_dim=16, depth=1, heads=2, window=2, global_blocks=(0,), out_chans=16, mlp_dim=32
)


def tiny_sam(path: Path) -> Path:
    """A SAM file with random weights."""
    torch.manual_seed(0)
    save_weights(path, build(SAM).state_dict(), {"kind": "sam", "architecture": SAM.to_metadata()})
    return path


def tiny_settings(root: Path, **conf: object) -> Settings:
    """Settings whose state lies beside the studies folder; nothing comes from the environment.

    Networks of six steps find nothing, so no label has a floor, and no folds are trained.
    """
    sam = root / "sam.safetensors"
    values = {
        "network": "unet",
        # one network: what is tested are rounds
        "nested_fraction": 0.0,
        "ssl_iterations": 6,
        "retrain_iterations": 4,
        "sam_iterations": 2,
        "sam_batch": 2,
        "adapter_iterations": 2,
        "batch_labelled": 1,
        "batch_unlabelled": 1,
        "patch": "32,32,16",
        "overlap": 0.0,
        "min_component": 0,
        "promote_threshold": "0",
        "promote_floor": "0",
        "label_folds": 0,
        "sam_checkpoint": str(sam if sam.exists() else tiny_sam(sam)),
        "model_dir": str(root / "models"),
        "min_free_gb": 0.0,
    }
    return Settings(**(values | conf))  # type: ignore[arg-type]


def tiny_studies(root: Path, cases: int = 6, labelled: int = 3, seed: int = 1) -> Path:
    """A studies folder of phantoms."""
    write_studies(root / "studies", cases, labelled, seed, shape=SHAPE)
    return root / "studies"


def tiny_network(classes: int, patch: Sequence[int]) -> nn.Module:
    """A U-Net whose model file has 0.2 MB; in place of :func:`aslseg.ssl.networks.unet` where files are kept."""
    return UNet(3, 1, classes, (6, 12, 12, 12, 12), (2, 2, 2, 2), num_res_units=1)


def make_tiny(promote: bool = True) -> None:
    """For the rest of this process: fewer batch-norm batches, one thread, and, as networks of six steps never
    look right, every mask that agrees counts as plausible."""
    from aslseg.agreement.promotion_rules import Verdict
    from aslseg.rounds.promotion import canaries, promotion
    from aslseg.ssl import engine

    torch.set_num_threads(1)
    engine.STATISTICS_BATCHES = 2
    if promote:
        promotion.judge = lambda *_: Verdict(True)  # type: ignore[assignment]
        canaries.FLOOR = 0.0


def copy_with_steps(before: Path, after: Path, root: Path) -> None:
    """Copy a folder, but with the steps of a round that was run on it in another one, which will be found again.

    Args:
        before: The folder of the studies folder, the SAM file and the models.
        after: The same after the round.
        root: Where the copy goes.
    """
    shutil.copytree(before, root, dirs_exist_ok=True, ignore=shutil.ignore_patterns("steps", "cache"))
    for name in ("rounds/steps", "cache"):
        folder = Path("studies") / ".aslseg" / name
        # files are only ever replaced, so that a second name is as good as a copy
        shutil.copytree(after / folder, root / folder, copy_function=os.link)


def folds_one_by_one(pipeline: Any) -> Callable[..., list[Path | TrainingDivergedError]]:
    """``train_folds`` by way of ``train_ssl``, for a pipeline in which that is a stand-in."""

    def train_folds(
        parts: Sequence[Any], report: Any, part: float, promoted: Sequence[Any] = ()
    ) -> list[Path | TrainingDivergedError]:
        found: list[Path | TrainingDivergedError] = []
        for number, without in enumerate(parts):
            own = promoted[number] if promoted else []
            try:
                found.append(pipeline.train_ssl(own, report, without=without, part=part))
            except TrainingDivergedError as error:
                found.append(error)
        return found

    return train_folds


def label_hashes(studies: Path) -> dict[str, str]:
    """``tag/file`` to hash, of every label there is; as everywhere, a hidden file (a killed write's) is none."""
    files = sorted(f for f in (studies / "labels").rglob("*.nii.gz") if not f.name.startswith("."))
    return {str(f.relative_to(studies / "labels")): sha256(f) for f in files}


def published_hashes(settings: Settings, studies: Path) -> dict[str, str]:
    """Kind to hash of the published models."""
    from aslseg.models.published import manifest

    return {kind: entry["sha256"] for kind, entry in manifest(Paths(settings, studies)).items()}
