"""All settings as one frozen model."""

from __future__ import annotations

from difflib import get_close_matches

from pydantic import model_validator

from aslseg.registry import suggest
from aslseg.settings.running import ClickSettings, MachineSettings, NightSettings, RoundSettings
from aslseg.settings.server import ServerSettings
from aslseg.settings.training import AdapterSettings, DataSettings, NestedSettings, SAMSettings, SSLSettings
from aslseg.types import Labels

SECTIONS = (
    *(DataSettings, SSLSettings, NestedSettings, SAMSettings, AdapterSettings),
    *(ClickSettings, RoundSettings, NightSettings, ServerSettings, MachineSettings),
)

TARGET, NESTED_TARGET = 0.85, 0.7
"""Mean Dice that promoted masks should have, of labels that lie in no other one and of those that do."""
BELOW_TARGET, LEAST_FLOOR = 0.05, 0.5
"""How far the Dice on human labels may lie below the target of a promoted label, and the least of these floors."""
MOST_FOLDS = 4


# pydantic takes the fields of the last base first
class Settings(
    MachineSettings,
    ServerSettings,
    NightSettings,
    RoundSettings,
    ClickSettings,
    AdapterSettings,
    SAMSettings,
    NestedSettings,
    SSLSettings,
    DataSettings,
):
    """All settings, read by :func:`aslseg.settings.load_settings` or given by name; docs/settings.md lists them.

    Text such as ``labels="liver,tumour"`` is parsed when the model is made. ``model_dump`` gives the text again, so
    that hashes of steps do not depend on how a value is kept in memory.
    """

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        if self.window_low >= self.window_high:
            raise ValueError(f"window_low {self.window_low} must lie below window_high {self.window_high}")
        _ = self.label_set
        for setting in ("promote_threshold", "promote_target", "promote_floor"):
            given = getattr(self, setting)
            for name, _ in given.exceptions if given != type(self).model_fields[setting].default else ():
                if name not in self.labels:
                    raise ValueError(f"{setting}: unknown label {name!r}; {suggest(name, list(self.labels))}")
        return self

    @property
    def label_set(self) -> Labels:
        """The labels with their nesting; of the default of ``nested``, the pairs whose labels there are."""
        pairs = self.nested
        if pairs == type(self).model_fields["nested"].default:
            pairs = tuple(pair for pair in pairs if set(pair) <= set(self.labels))
        return Labels.of(self.labels, pairs)

    @property
    def thresholds(self) -> dict[str, float]:
        """Least agreement for promotion, by label name."""
        return self.promote_threshold.by_label(self.labels)

    @property
    def targets(self) -> dict[str, float]:
        """Mean Dice that promoted masks should have, by label name."""
        labels = self.label_set
        automatic = {
            name: TARGET if parent is None else NESTED_TARGET
            for name, parent in zip(labels.names, labels.parents, strict=True)
        }
        return self.promote_target.by_label(automatic)

    @property
    def floors(self) -> dict[str, float]:
        """Least Dice on human labels for promotion, by label name: for ``auto``, the target minus 0.05."""
        return self.promote_floor.by_label(
            {name: max(LEAST_FLOOR, round(target - BELOW_TARGET, 4)) for name, target in self.targets.items()}
        )

    @property
    def most_folds(self) -> int:
        """Most parts into which a round splits the labelled patients."""
        return MOST_FOLDS if self.label_folds == "auto" else self.label_folds

    @property
    def misspelt_defaults(self) -> dict[str, str]:
        """Labels that defaults name and ``labels`` lacks, with a label of nearly that name: ``tumour`` to ``tumor``."""
        fields = type(self).model_fields
        named: set[str] = set()
        if self.nested == fields["nested"].default:
            named.update(name for pair in self.nested for name in pair)
        if self.promote_threshold == fields["promote_threshold"].default:
            named.update(name for name, _ in self.promote_threshold.exceptions)
        close = {name: get_close_matches(name, self.labels, 1, 0.8) for name in sorted(named - set(self.labels))}
        return {name: found[0] for name, found in close.items() if found}


class ResolvedSettings(Settings):
    """Settings without ``auto`` for what depends on the hardware; see :mod:`aslseg.compute.hardware`."""

    network: str
    patch_voxels: float
    ssl_iterations: int
    retrain_iterations: int
    batch_labelled: int
    batch_unlabelled: int
