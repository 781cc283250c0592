"""What a setting consists of: type, default, limits, and a text that stands alone in docs/settings.md."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Auto = Literal["auto"]


def setting(
    default: Any, description: str, *, unit: str = "", example: str = "", common: bool = False, **limits: Any
) -> Any:
    """A field whose text, unit and example end up in docs/settings.md, and in the app's README if it is common."""
    extra: dict[str, Any] = {"unit": unit, "example": example, "common": common}
    return Field(default, description=description, json_schema_extra=extra, **limits)


class Section(BaseModel):
    """Settings of one subject, frozen; numbers are finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
