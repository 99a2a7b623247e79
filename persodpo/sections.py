"""What all sections of a profile are made of."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Correction = Literal["as_released", "corrected"]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]


def distinct(values: tuple[str, ...]) -> tuple[str, ...]:
    """Refuse a list that names something twice."""
    twice = [value for value in values if values.count(value) > 1]
    if twice:
        raise ValueError(f"'{twice[0]}' stands twice; name each once")
    return values


class Section(BaseModel):
    """Base of all profile sections: frozen, no unknown keys, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
