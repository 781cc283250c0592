"""One typed class for every setting: ``--conf`` pairs over ``ASLSEG_*`` over ``.env`` over defaults.

Imports no torch, so that ``aslseg --help`` and MONAI Label's constructors stay quick.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from dotenv import dotenv_values
from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from aslseg.errors import BadSettingsError
from aslseg.registry import NETWORKS, RECIPES, SSL_METHODS, suggest
from aslseg.types import Labels

PREFIX = "ASLSEG_"
APP_DIR = Path(os.environ.get("ASLSEG_APP_DIR", Path(__file__).resolve().parents[2] / "apps" / "aslseg"))
# Keys that MONAI Label itself or its sample apps put into --conf; not ours to refuse.
PLATFORM_KEYS = {"models", "preload", "auto_update_scoring"}


def _setting(default: Any, description: str, *, unit: str = "", example: str = "", **limits: Any) -> Any:
    """A field whose help, unit and example end up in apps/aslseg/README.md."""
    extra: dict[str, Any] = {"unit": unit, "example": example or str(default)}
    return Field(default, description=description, json_schema_extra=extra, **limits)


class Settings(BaseSettings):
    """Everything that can be set, frozen once read. See apps/aslseg/README.md for the generated table."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", env_prefix=PREFIX)

    # what is segmented
    labels: str = _setting(
        "liver,tumour", "Label names in the order of their values 1..N, background left out", example="atrium"
    )
    nested: str = _setting(
        "tumour:liver",
        "child:parent pairs where the child lies inside the parent; pairs of unknown labels are ignored",
        example="tumour:liver,cyst:liver",
    )
    modality: Literal["ct", "mr"] = _setting("ct", "ct: fixed window in HU; mr: percentiles of each scan")
    window_low: float = _setting(-160.0, "Lower end of the CT window", unit="HU")
    window_high: float = _setting(240.0, "Upper end of the CT window", unit="HU")
    spacing: str = _setting(
        "auto",
        "Working grid: auto (median of the labelled scans, coarsened to max_working_voxels), native, or x,y,z",
        unit="mm",
        example="1.5,1.5,2",
    )
    max_working_voxels: float = _setting(
        4e6, "Size that the automatic working grid may not exceed for the median scan", unit="voxels", gt=1e3
    )
    max_voxels: float = _setting(1.6e9, "Scans with more voxels are refused", unit="voxels", gt=1)

    # stage 1
    ssl_method: str = _setting("bcp_mt", "How labelled and unlabelled scans are learned from")
    network: str = _setting("vnet_small", "Network of the SSL model")
    patch: str = _setting(
        "auto", "Training patch: auto or x,y,z, rounded to multiples of 16, at least 32,32,16", unit="voxels"
    )
    patch_voxels: float = _setting(2e5, "Size that an automatic patch aims for", unit="voxels", gt=500)
    ssl_iterations: int = _setting(2000, "Training steps of the SSL model", unit="steps", gt=0)
    retrain_iterations: int = _setting(1500, "Training steps when retraining with pseudo-labels", unit="steps", gt=0)
    batch_labelled: int = _setting(2, "Labelled patches in a batch", unit="patches", gt=0)
    batch_unlabelled: int = _setting(2, "Unlabelled patches in a batch", unit="patches", ge=0)
    accumulate: int = _setting(
        1, "Batches whose mean gradient makes a step; several processes share them out", unit="batches", gt=0
    )
    learning_rate: float = _setting(0.01, "Initial learning rate of the SSL model (SGD)", gt=0)
    schedule: Literal["poly", "milestones"] = _setting(
        "poly", "Learning rate over the training: poly (1 - t)^0.9, or milestones: x 0.1 at 41.7 % and 83.3 %"
    )
    consistency: Literal["auto"] | Annotated[float, Field(ge=0)] = _setting(
        "auto",
        "Largest weight of the unlabelled loss; auto: as published, 1 for dtc and mcnet, else 0.1",
        example="0.1",
    )
    ema_decay: float = _setting(0.99, "Decay of the EMA teacher", gt=0, lt=1)
    overlap: float = _setting(0.5, "Overlap of sliding windows", ge=0, lt=0.95)
    flips: bool = _setting(
        False, "For anatomy without a left and a front: train with such flips, and average predictions over them"
    )

    # stage 2
    sam_checkpoint: str = _setting(
        "",
        "SAM weights to start from; empty: the small SAM that ships",
        unit="file",
        example="sam.safetensors",
    )
    sam_kind: Literal["auto", "sam", "medsam", "sam_med2d"] = _setting(
        "auto", "What sam_checkpoint is; auto: by its content, and by its name where sam_vit_b and MedSAM look alike"
    )
    sam_base: str = _setting(
        "", "SAM that a CFR file was trained from, which holds LoRA only", unit="file", example="sam_vit_b_01ec64.pth"
    )
    sam_image_size: int = _setting(
        0, "Edge of SAM's input; another one than the file's resizes its positions; 0: the file's", unit="pixels", ge=0
    )
    sam_iterations: int = _setting(300, "Fine-tuning steps of SAM", unit="steps", ge=0)
    sam_batch: int = _setting(8, "Slices in a SAM batch", unit="slices", gt=0)
    sam_learning_rate: float = _setting(2e-4, "Learning rate of SAM fine-tuning (AdamW)", gt=0)
    sam_train: Literal["decoder", "adapter", "lora", "full"] = _setting(
        "full", "Which part of SAM is fine-tuned: with the decoder nothing, SAM-Med2D's adapters, LoRA, or everything"
    )
    sam_lora_rank: int = _setting(4, "Rank of LoRA on queries and values", gt=0)
    sam_canvas: int = _setting(
        0,
        "Edge of the canvas on which recipe cfr stitches slices; 0: SAM's input, or a slice's edge where that is more",
        unit="pixels",
        ge=0,
    )
    sam_zoom: float = _setting(
        5, "At shorter objects SAM looks twice, whole slice and enlarged; 0: never", unit="tokens", ge=0
    )
    sam_prompts: str = _setting("box+point+mask", "What the SSL mask is turned into", example="box+mask")
    box_margin: float = _setting(3.0, "Dilation of the box prompt", unit="pixels of SAM's input", ge=0)
    min_component: int = _setting(9, "Smaller 2-D components give no prompt", unit="pixels", ge=0)
    positive_points: int = _setting(1, "Points inside each component of a mask that prompts SAM", ge=1)
    negative_points: int = _setting(0, "Points in its box outside the mask", ge=0)

    # clicks
    use_ssl: bool = _setting(True, "Clicks repair the automatic mask, where there is one, instead of drawing anew")
    first_click_seconds: float = _setting(
        0.5, "A first click is answered after this; the object grows on and comes with the next reply", unit="s", ge=0
    )
    click_seconds: float = _setting(
        0.08, "The same for every further click, whose earlier mask is there", unit="s", ge=0
    )
    run_seconds: float = _setting(
        5.0,
        "The same for OHIF, where Run is pressed after the clicks and nothing says that the object grows",
        unit="s",
        ge=0,
    )
    grow_iou: float = _setting(0.5, "Growing to the next slice stops where SAM predicts less", unit="IoU", ge=0, le=1)
    grow_overlap: float = _setting(0.3, "Or the mask overlaps less with the one before", unit="Dice", ge=0, le=1)
    grow_area: float = _setting(2.0, "Or its area is more than this many times the one before", gt=1)
    grow_intensity: float = _setting(
        2.0, "Or its median lies this far from the clicked slices', in their standard deviations", gt=0
    )
    grow_agreement: float = _setting(
        0.98, "A correction ends where it changes a slice less than this", unit="Dice", gt=0, le=1
    )
    prefetch_slices: int = _setting(8, "Slices on each side of a click encoded in the background", unit="slices", ge=0)
    embedding_memory_mb: float = _setting(500, "Embeddings kept in memory", unit="MB", ge=0)
    embedding_disk_gb: float = _setting(5, "Embeddings kept on disk; 0: none", unit="GB", ge=0)
    embed_cases: int = _setting(
        0, "After a round, encode this many of the scans that the strategies hand out first", unit="scans", ge=0
    )

    # stage 3
    adapter_iterations: int = _setting(600, "Training steps of the adaptation network", unit="steps", ge=0)
    adapter_learning_rate: float = _setting(2e-3, "Learning rate of the adaptation network (AdamW)", gt=0)

    # rounds
    recipe: str = _setting("aslseg", "The steps of a round")
    validation_fraction: float = _setting(0.2, "Part of the labelled patients kept for the publishing gate", ge=0, lt=1)
    promote_threshold: str = _setting(
        "0.9,tumour=0.7",
        "Least Dice agreement per class for promotion: one number, then exceptions by label",
        unit="Dice",
        example="0.85,tumour=0.6",
    )
    promote_fraction: float = _setting(
        0.5, "At most this part of the unlabelled scans is promoted in one round", ge=0, le=1
    )
    promote_weight: float = _setting(0.5, "Weight of a promoted scan's loss in retraining", ge=0, le=1)
    disagreement_weight: float = _setting(
        0.3, "Weight of a promoted scan's voxels where SSL and adaptation disagree", ge=0, le=1
    )
    gate_tolerance: float = _setting(
        0.0, "Validation Dice a new model may lose and still be published", unit="Dice", ge=0, le=1
    )
    first_round: bool = _setting(True, "With nothing published yet, the server starts a round by itself")

    # machine
    device: str = _setting("auto", "auto, cpu, cuda, cuda:1", example="cuda:0")
    memory_gb: float = _setting(
        4.0, "Memory for prepared scans in training; the rest stays memory-mapped on disk", unit="GB", ge=0
    )
    compile: bool = _setting(False, "Compile the SSL networks (torch.compile) for training; needs a C++ compiler")
    tracking: Literal["none", "tensorboard", "mlflow", "tensorboard+mlflow"] = _setting(
        "none", "Where training curves go, as files in the folder tracking in home", example="tensorboard"
    )
    threads: int = _setting(0, "CPU threads; 0: all cores", unit="threads", ge=0)
    seed: int = _setting(1337, "Seed of every generator", ge=0)
    home: str = _setting("", "Ledger and round files; empty: .aslseg in the studies folder", unit="folder")
    model_dir: str = _setting(
        "",
        "Published models, may be shared by servers; empty: a folder per studies in apps/aslseg/model",
        unit="folder",
    )
    min_free_gb: float = _setting(1.0, "Free disk below which nothing is written", unit="GB", ge=0)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only explicit values: :func:`load_settings` reads the sources, so that each value's origin is known."""
        return (init_settings,)

    @field_validator("ssl_method")
    @classmethod
    def _known_method(cls, value: str) -> str:
        return _known(value, list(SSL_METHODS), "ssl_method")

    @field_validator("network")
    @classmethod
    def _known_network(cls, value: str) -> str:
        return _known(value, list(NETWORKS), "network")

    @field_validator("recipe")
    @classmethod
    def _known_recipe(cls, value: str) -> str:
        return _known(value, list(RECIPES), "recipe")

    @field_validator("sam_prompts")
    @classmethod
    def _known_prompts(cls, value: str) -> str:
        for part in value.split("+"):
            _known(part, ["box", "point", "mask"], "sam_prompts")
        return value

    @field_validator("spacing", "patch")
    @classmethod
    def _triple(cls, value: str) -> str:
        if value in ("auto", "native"):
            return value
        try:
            numbers = [float(v) for v in value.split(",")]
        except ValueError:
            numbers = []
        if len(numbers) != 3 or min(numbers) <= 0:
            raise ValueError(f"expected auto or three positive numbers x,y,z, got {value!r}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        if self.window_low >= self.window_high:
            raise ValueError(f"window_low {self.window_low} must lie below window_high {self.window_high}")
        _ = self.label_set
        _ = self.thresholds
        return self

    @property
    def label_set(self) -> Labels:
        """The labels with their nesting."""
        return Labels.parse(self.labels, self.nested)

    @property
    def thresholds(self) -> dict[str, float]:
        """Least agreement for promotion, by label name."""
        general, exceptions = 0.9, {}
        for part in self.promote_threshold.split(","):
            name, _, number = part.rpartition("=")
            try:
                value = float(number)
            except ValueError:
                raise ValueError(f"promote_threshold: {part!r} is not a number or label=number") from None
            if not 0 <= value <= 1:
                raise ValueError(f"promote_threshold: {value} is outside 0..1")
            if name:
                exceptions[name.strip()] = value
            else:
                general = value
        return {name: exceptions.get(name, general) for name in self.label_set.names}


# Settings that only some steps see; all others (labels, windows, seed, whatever is added) count for every step.
# Iterations, spacing and the SAM file are given to the steps that use them as numbers and hashes.
GROUPS = {
    "ssl": {"ssl_method", "network", "batch_labelled", "batch_unlabelled", "accumulate", "learning_rate", "schedule"}
    | {"compile", "consistency", "ema_decay", "flips"},
    "predict": {"overlap", "flips"},
    "sam": {n for n in Settings.model_fields if n.startswith("sam_")}
    - {"sam_prompts", "sam_zoom", "sam_checkpoint", "sam_base"}
    | {"flips"},
    "prompts": {"sam_prompts", "sam_zoom", "box_margin", "min_component", "positive_points", "negative_points"},
    "adapter": {n for n in Settings.model_fields if n.startswith("adapter_")},
    "round": {"recipe", "validation_fraction", "promote_threshold", "promote_fraction", "promote_weight"}
    | {"disagreement_weight", "gate_tolerance", "first_round", "ssl_iterations", "retrain_iterations", "spacing"}
    | {"max_working_voxels", "max_voxels"},
    "clicks": {"use_ssl", "first_click_seconds", "click_seconds", "run_seconds", "prefetch_slices"}
    | {n for n in Settings.model_fields if n.startswith(("grow_", "embed"))},
    "machine": {"device", "threads", "home", "model_dir", "min_free_gb", "memory_gb", "tracking"}
    | {"sam_checkpoint", "sam_base"},
}


def relevant(settings: Settings, *groups: str) -> dict[str, Any]:
    """The settings that a step depends on: its groups and everything that belongs to no group."""
    left_out = set().union(*(names for group, names in GROUPS.items() if group not in groups))
    for group in groups:
        left_out -= GROUPS[group]
    return settings.model_dump(exclude=left_out | GROUPS["machine"])


def _known(value: str, known: list[str], what: str) -> str:
    if value not in known:
        raise ValueError(f"unknown {what} {value!r}; {suggest(value, known)}")
    return value


def load_settings(
    conf: Mapping[str, str] | None = None, env: Mapping[str, str] | None = None, dotenv: Path | None = None
) -> tuple[Settings, dict[str, str]]:
    """Read the settings from their three sources.

    Args:
        conf: ``--conf`` pairs, the strongest source. MONAI Label's own keys are passed over.
        env: Environment; ``os.environ`` by default. Only ``ASLSEG_*`` is looked at.
        dotenv: A ``.env`` file; the one in the working folder by default.

    Returns:
        The settings, and for every setting where its value came from:
        ``conf``, ``environment``, ``.env`` or ``default``.

    Raises:
        BadSettingsError: Unknown key (with the nearest valid name) or unusable value.
    """
    known = list(Settings.model_fields)
    sources = (
        (".env", _prefixed(dotenv_values(dotenv or Path(".env")))),
        ("environment", _prefixed(os.environ if env is None else env)),
        ("conf", {k: v for k, v in (conf or {}).items() if k not in PLATFORM_KEYS}),
    )
    values: dict[str, Any] = {}
    origin = dict.fromkeys(known, "default")
    for source, pairs in sources:
        for key, value in pairs.items():
            if key not in known:
                raise BadSettingsError(f"unknown setting {key!r} in {source}; {suggest(key, known)}")
            values[key], origin[key] = value, source
    try:
        return Settings(**values), origin
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc'])) or 'settings'}: {e['msg']}" for e in error.errors()]
        raise BadSettingsError("; ".join(lines)) from None


def _prefixed(pairs: Mapping[str, str | None]) -> dict[str, str]:
    found = {k[len(PREFIX) :].lower(): v for k, v in pairs.items() if k.startswith(PREFIX) and v is not None}
    found.pop("app_dir", None)
    return found


class Paths:
    """Where the files of one studies folder (or DICOMweb address) live.

    Attributes:
        studies: The studies folder, or None for a DICOMweb address.
        home: Ledger, rounds and caches.
        models: Published models.
    """

    def __init__(self, settings: Settings, studies: str | Path) -> None:
        text = str(studies)
        address = re.match(r"(https?):/+", text)
        remote = address is not None
        if address:  # pathlib leaves one slash of two
            text = f"{address[1]}://{text[address.end() :]}"
        self.studies = None if remote else Path(text).resolve()
        name = text.split("//")[-1].split("/")[0].replace(":", "-") if remote else Path(text).resolve().name
        key = f"{name}-{hashlib.sha256((text if remote else str(self.studies)).encode()).hexdigest()[:8]}"
        own = (Path(settings.model_dir) if settings.model_dir else APP_DIR / "model") / key
        self.models = Path(settings.model_dir) if settings.model_dir else own
        if settings.home:
            self.home = Path(settings.home)
        else:
            self.home = own / "home" if self.studies is None else self.studies / ".aslseg"
        self.ledger = self.home / "ledger.sqlite"
        self.rounds = self.home / "rounds"
        self.cache = self.home / "cache"
