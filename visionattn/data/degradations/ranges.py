"""Options of degradations that are a number or a range, from which chance draws a number."""

from __future__ import annotations

from typing import Annotated

from numpy.random import RandomState
from pydantic import AfterValidator, BeforeValidator, Field


def _as_pair(value: object) -> object:
    return (value, value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def _ordered(pair: tuple) -> tuple:
    if not 0 <= pair[0] <= pair[1]:
        raise ValueError(f"a range reads [low, high] with 0 <= low <= high, but is {list(pair)}")
    return pair


#: A number, or [low, high], from which a value is drawn evenly for every image.
Range = Annotated[tuple[float, float], BeforeValidator(_as_pair), AfterValidator(_ordered)]
Probability = Annotated[float, Field(ge=0, le=1)]
Quality = Annotated[int, Field(ge=1, le=100)]
#: A quality of JPEG, or [low, high], both included.
QualityRange = Annotated[tuple[Quality, Quality], BeforeValidator(_as_pair), AfterValidator(_ordered)]


def draw(rng: RandomState, bounds: tuple[float, float]) -> float:
    """A value of a range; where both ends are one, no random number is taken, as fixed noise is defined."""
    low, high = bounds
    return float(low) if low == high else rng.uniform(low, high)
