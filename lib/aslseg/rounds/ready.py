"""What has to hold before a round, or a part of one, begins."""

from __future__ import annotations

from aslseg.rounds.label_files.label_values import require_same_values
from aslseg.rounds.ledger.ledger import Ledger
from aslseg.settings import Paths, Settings
from aslseg.volume.io import require_free_disk


def make_ready(paths: Paths, settings: Settings, ledger: Ledger) -> None:
    """Check disk, ledger and labels, and set the number of threads.

    Raises:
        DiskFullError: Less than ``min_free_gb`` is free.
        LedgerError: Events are missing.
        BadSettingsError: A label has another value than in the last round.
    """
    require_free_disk(paths.home, settings.min_free_gb)
    ledger.require_whole()
    require_same_values(ledger, paths.studies, settings)
    if settings.threads:
        import torch

        torch.set_num_threads(settings.threads)
