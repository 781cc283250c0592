"""Every error that a user can meet. A message says what was expected, what came and what to do."""

from __future__ import annotations


class AslsegError(Exception):
    """Base of all errors with a message meant for the person at the screen."""


class BadSettingsError(AslsegError):
    """A setting is unknown or its value cannot be used (command line exit code 2)."""


class BadImageError(AslsegError):
    """An image file cannot be read as a finite 3-D volume."""


class BadLabelError(AslsegError):
    """A label does not belong to its image or holds values outside the configured labels."""


class NotEnoughCasesError(AslsegError):
    """The studies folder holds too few labelled or unlabelled cases for what was asked."""


class BadWeightsError(AslsegError):
    """A model file is damaged, of another kind, or does not fit the settings."""


class NoModelError(AslsegError):
    """Nothing has been trained or published yet for the task asked for."""


class BadPromptError(AslsegError):
    """Clicks or boxes that cannot be understood."""


class TrainingDivergedError(AslsegError):
    """Training gave NaN or collapsed to the empty mask."""


class RoundRunningError(AslsegError):
    """Another round is running on the studies folder."""


class OutOfTimeError(AslsegError):
    """The window of time for a round is over; what is done is kept, and the round goes on the next time."""


class NotEnoughMemoryError(AslsegError):
    """A prediction does not fit into memory, whatever its batch and window size."""


class NoResourcesError(AslsegError):
    """The operating system has no process, memory or file left for a piece of work; later it may."""


class DiskFullError(AslsegError, OSError):
    """The disk is full, or has less free space than a step needs; what was there before is untouched."""


class FileWriteError(AslsegError, OSError):
    """A file cannot be written, for another reason than a full disk; what was there before is untouched."""


class LedgerError(AslsegError):
    """The ledger cannot do what was asked (no such round, damaged file)."""
