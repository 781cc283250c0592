"""Which settings a step's result depends on."""

from __future__ import annotations

from typing import Any

from aslseg.settings.model import Settings
from aslseg.settings.running import NightSettings
from aslseg.settings.server import ServerSettings

_SAM = {name for name in Settings.model_fields if name.startswith("sam_")}
_SAM_PROMPTS = {"sam_prompts", "sam_zoom", "box_margin", "min_component"}
_SAM_FILES = {"sam_checkpoint", "sam_base"}
_NESTED = {name for name in Settings.model_fields if name.startswith("nested_")}
SECOND_STAGE = 2
"""Version of the second stage of nested labels, among the inputs of its training: models of another version are not
loaded, so that rounds have to train anew. In the first it saw the parent's mask beside the scan."""
# in SAM and the adaptation network: relative intensities, synthetic lesions, and whether there are any
_NESTED_LATER = {"nested_fraction", "nested_range", "nested_synthetic"}

# Settings that only some steps see; all others (labels, windows, seed, whatever is added) count for every step.
# Iterations, spacing and the SAM file are given to the steps that use them as numbers and hashes.
GROUPS = {
    "ssl": {"ssl_method", "network", "batch_labelled", "batch_unlabelled", "accumulate", "learning_rate", "schedule"}
    | {"compile", "consistency", "ema_decay", "flips"}
    | _NESTED,
    "predict": {"overlap", "flips"},
    "sam": (_SAM - _SAM_PROMPTS - _SAM_FILES) | {"flips"} | _NESTED_LATER,
    "prompts": _SAM_PROMPTS,
    "adapter": {name for name in Settings.model_fields if name.startswith("adapter_")} | _NESTED_LATER,
    "round": {"recipe", "validation_fraction", "promote_threshold", "promote_fraction", "promote_weight"}
    | {"promote_target", "promote_confidence", "audits", "promote_floor"}
    | {"disagreement_weight", "uncertainty_weight", "retrain_from", "label_folds", "gate_tolerance", "first_round"}
    | {"ssl_iterations", "retrain_iterations", "spacing", "keep_models", "promote_cases", "promote_empty"}
    | {"max_working_voxels", "max_voxels", "max_upload_voxels", "report_webhook"},
    "clicks": {"use_ssl", "first_click_seconds", "click_seconds", "prefetch_slices"}
    | {name for name in Settings.model_fields if name.startswith("embed")},
    "night": set(NightSettings.model_fields),
    "server": set(ServerSettings.model_fields),
    "machine": {"device", "threads", "home", "model_dir", "min_free_gb", "training_memory_gb", "tracking"}
    | {"round_disk_gb", "folds_at_once"}
    | _SAM_FILES,
}


def relevant(settings: Settings, *groups: str) -> dict[str, Any]:
    """The settings that a step depends on: its groups and everything that belongs to no group.

    Without a second stage, or without nested labels, its settings do not count.

    Steps are found again by the hash of this, so names and words stay those of version 0.1, with the values of
    settings that have become constants since.
    """
    left_out = set().union(*(names for group, names in GROUPS.items() if group not in groups))
    for group in groups:
        left_out -= GROUPS[group]
    nested = bool(settings.nested_fraction) and settings.label_set.has_nested
    if not nested:
        left_out |= _NESTED
    values: dict[str, Any] = settings.model_dump(exclude=left_out | GROUPS["machine"])
    if nested and "ssl" in groups:
        values["second_stage"] = SECOND_STAGE
    if values.get("sam_train") == "med2d_adapter":
        values["sam_train"] = "adapter"
    if "prompts" in groups:
        values |= {"positive_points": 1, "negative_points": 0}
    return values
