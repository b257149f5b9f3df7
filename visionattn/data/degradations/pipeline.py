"""Degradations as data: a list of steps with their options, as a configuration writes it.

    [{name: blur, sigma: [0.2, 3]}, {name: bicubic}, {name: gaussian_noise, sigma: 10}]

A step is a function of this package; its options are the function's arguments.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import pydantic
from numpy.random import RandomState
from torch import Tensor

from visionattn.data.degradations.blur import blur
from visionattn.data.degradations.haze import haze
from visionattn.data.degradations.jpeg import jpeg
from visionattn.data.degradations.noise import gaussian_noise, hyperspectral_noise, poisson_noise
from visionattn.data.degradations.real_world import real_world
from visionattn.data.degradations.resize import bicubic, quantize
from visionattn.errors import nearest

STEPS: dict[str, Callable[..., Tensor]] = {
    function.__name__: function
    for function in (
        bicubic,
        blur,
        gaussian_noise,
        haze,
        hyperspectral_noise,
        jpeg,
        poisson_noise,
        quantize,
        real_world,
    )
}
# Arguments of steps that are no options: a step is given those that it has.
_CONTEXT = ("image", "rng", "upscale", "depth")


class Degradation:
    """Makes the input that belongs to a true image.

    Args:
        steps: mappings of `name` and options, carried out in this order.
        upscale: side of the truth / side of the input.

    Attributes:
        names: the steps.

    Raises:
        ValueError: an unknown step or option, or a value that it does not take; one sentence.
    """

    def __init__(self, steps: Sequence[Mapping[str, Any]], upscale: int = 1) -> None:
        self.upscale = upscale
        self.names = [str(step.get("name")) for step in steps]
        self._options = [_check(step) for step in steps]

    def __call__(self, image: Tensor, rng: RandomState, depth: Tensor | None = None) -> Tensor:
        """The degraded image.

        Args:
            image: the truth, float32 `[C, H, W]` in [0, 1].
            rng: all chance comes from here.
            depth: `[1, H, W]`, for haze.

        Returns:
            `[C, H / upscale, W / upscale]`, not clipped unless a step does so.
        """
        for name, options in zip(self.names, self._options, strict=True):
            context = {"image": image, "rng": rng, "upscale": self.upscale, "depth": depth}
            wanted = inspect.signature(STEPS[name]).parameters
            image = STEPS[name](**{key: context[key] for key in _CONTEXT if key in wanted}, **options)
        return image


def _check(step: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a step, validated by the types of its function's arguments."""
    options = dict(step)
    name = options.pop("name", None)
    if name not in STEPS:
        raise ValueError(f"there is no degradation {name!r}: {nearest(str(name), STEPS)}")
    model = _options_model(name)
    unknown = [key for key in options if key not in model.model_fields]
    if unknown:
        raise ValueError(
            f"the degradation {name} has no option {unknown[0]!r}: "
            f"{nearest(unknown[0], model.model_fields) if model.model_fields else 'it has none'}"
        )
    try:
        checked = model.model_validate(options)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "missing":
            raise ValueError(f"the degradation {name} needs the option {key}") from error
        reason = first["msg"].removeprefix("Input ").removeprefix("Value error, ")
        raise ValueError(f"{key} of the degradation {name}: {reason}; given was {options}") from error
    return {key: getattr(checked, key) for key in model.model_fields}


@cache
def _options_model(name: str) -> type[pydantic.BaseModel]:
    hints = typing.get_type_hints(STEPS[name], include_extras=True)
    fields: dict[str, Any] = {
        key: (hints[key], ... if parameter.default is parameter.empty else parameter.default)
        for key, parameter in inspect.signature(STEPS[name]).parameters.items()
        if key not in _CONTEXT
    }
    return pydantic.create_model(name, **fields)
