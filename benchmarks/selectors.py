"""Ways to attend to a part of a map: error, attention mass and time at equal densities, on a trained network.

Queries, keys and values are those of a layer of a network that `tools/train.py` trained, for built-in
photographs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from benchmarks.measure import Timing, peak_memory, time_in_turn
from benchmarks.report import Page, memory_cell, time_cell
from benchmarks.selector_methods import METHODS, Choice, Maps, Method, attend, density_of, with_own
from visionattn.data.photographs import photograph_files
from visionattn.errors import InputError
from visionattn.kernels.routed.lists import listed_regions
from visionattn.tasks import create_task, load_trained_config

DENSITIES = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
# A method that cannot be set to a density within this factor has no row there.
_NEAR = 1.4


@dataclass(frozen=True)
class Quality:
    """How near an attention is to the full one, over all photographs.

    Attributes:
        density: pairs of pixels that are compared, as a share of all.
        error: norm of the difference of the outputs, relative to the norm of the full ones.
        mass: the mean share of the weights of a query that stand on what is listed; None where outputs are
            more than a softmax over a part of the keys.
        recall: of the regions with the most mass, as many as are listed, the share that is listed; None where
            no regions are.
    """

    density: float
    error: float
    mass: float | None
    recall: float | None


@dataclass(frozen=True)
class Row:
    """One method at one density.

    Attributes:
        method: what lists.
        target: the density that was asked for.
        chosen: as the method lists.
        forced: with the own region of every query forced onto its list; None where that is not to be had.
        selection: time to list; None where selection and attention are one.
        attention: time of the attention along the lists.
        ratio: time of both, divided by that of the full attention.
        memory: peak bytes of both.
    """

    method: str
    target: float
    chosen: Quality
    forced: Quality | None
    selection: Timing | None
    attention: Timing
    ratio: float
    memory: int | None

    def cells(self) -> tuple[str, ...]:
        """The line under the columns of `page`."""
        forced = self.forced
        return (
            self.method,
            f"1/{1 / self.target:.0f}",
            f"{self.chosen.density:.3f}",
            _number(self.chosen.error),
            _number(self.chosen.mass),
            _number(self.chosen.recall),
            "-" if forced is None else f"{forced.density:.3f}",
            _number(None if forced is None else forced.error),
            _number(None if forced is None else forced.mass),
            "-" if self.selection is None else time_cell(self.selection),
            time_cell(self.attention),
            f"{self.ratio:.2f}x",
            memory_cell(self.memory),
        )


def _number(x: float | None) -> str:
    return "-" if x is None else f"{x:.2f}"


def open_layer(run: str, layer: str, device: torch.device | str = "cpu") -> tuple[Any, Any]:
    """The network of a run folder, and its attention layer of this name.

    Raises:
        InputError: there is no such run, or no such layer with a `qkv` projection and `num_heads`.
    """
    if not Path(run).is_dir():
        raise InputError(f"there is no run folder {run}; python tools/train.py CONFIG makes one")
    model = create_task(load_trained_config(run)).to(device).eval().model
    found = dict(model.named_modules()).get(layer)
    if not isinstance(getattr(found, "qkv", None), nn.Module) or not hasattr(found, "num_heads"):
        names = [name for name, module in model.named_modules() if hasattr(module, "qkv")]
        raise InputError(f"the network has no attention layer {layer!r}; it has {', '.join(names)}")
    return model, found


@torch.no_grad()
def read_maps(model: Any, layer: Any, side: int) -> list[Maps]:
    """Queries, keys and values `[1, side, side, heads, d]` of the layer for the middle of every photograph of
    the validation side.

    Raises:
        InputError: a photograph is smaller than the layer needs for such maps.
    """
    device = next(model.parameters()).device
    mean, std = (torch.tensor(model.default_cfg[name], device=device) for name in ("mean", "std"))
    caught: list[Tensor] = []
    hook = layer.qkv.register_forward_hook(lambda _module, _inputs, output: caught.append(output))
    try:
        # How many pixels of the image are one of the map.
        model(torch.zeros(1, 3, 64, 64, device=device))
        size = side * 64 // caught.pop().shape[1]
        for file in photograph_files("validation").values():
            image = Image.open(file).convert("RGB")
            left, top = (image.width - size) // 2, (image.height - size) // 2
            if min(left, top) < 0:
                most = min(image.size) * side // size
                raise InputError(f"side must be at most {most} for {file.name}, got {side}")
            image = image.crop((left, top, left + size, top + size))
            pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(1, size, size, 3)
            model(((pixels.to(device) / 255 - mean) / std).permute(0, 3, 1, 2))
    finally:
        hook.remove()
    return [Maps(*x[:, :side, :side].unflatten(-1, (3, layer.num_heads, -1)).unbind(3)) for x in caught]


@dataclass(frozen=True)
class Truth:
    """The full attention of one photograph.

    Attributes:
        maps: queries, keys, values.
        out: `[1, H, W, heads, d]`.
        lse: `[1, H, W, heads]`.
        mass: `[1, heads, H * W, regions]`, the share of each region in the weights of each query.
    """

    maps: Maps
    out: Tensor
    lse: Tensor
    mass: Tensor


def full_attention(maps: Maps, region: tuple[int, int]) -> Truth:
    """Attention among all pixels, with its weights."""
    q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in maps)
    size = maps.q.shape[1:3]
    logits = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    weights = logits.softmax(-1)
    out, lse = (x.transpose(1, 2).unflatten(1, size) for x in (weights @ v, logits.logsumexp(-1)))
    rows, columns = size[0] // region[0], size[1] // region[1]
    mass = weights.unflatten(-1, (rows, region[0], columns, region[1])).sum((4, 6)).flatten(3)
    return Truth(maps, out, lse, mass)


def measure_selectors(
    maps: Sequence[Maps], region: tuple[int, int], *, repeats: int = 3, densities: Sequence[float] = DENSITIES
) -> Iterator[Row]:
    """Every method at every density that it can be set to; see `Row`.

    Args:
        maps: queries, keys and values of some photographs; times are those of the first.
        region: side of a region in pixels, a divisor of the maps' sides.
        repeats: measured rounds.
        densities: shares of all pairs of pixels.
    """
    truths = [full_attention(x, region) for x in maps]
    first = maps[0]
    q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in first)
    device = first.q.device
    known: dict[str, float] = {}
    for target in densities:
        for method in METHODS:
            options = nearest_options(method, first, region, target, known)
            if options is None:
                continue
            chosen = [method.choose(x, region, **options) for x in maps]
            forced = None
            if chosen[0].run is None and chosen[0].blocks is None:
                forced = judge(
                    [with_own(x, truth.maps, region) for x, truth in zip(chosen, truths)], truths, region
                )
            select = partial(method.choose, first, region, **options)
            calls = {
                "full": partial(F.scaled_dot_product_attention, q, k, v),
                "attention": lambda choice=chosen[0]: attend(first, choice, region),
            }
            if chosen[0].run is None:
                calls["selection"] = select
            timings = time_in_turn(calls, dict.fromkeys(calls, nullcontext), device, repeats)
            spent = timings["attention"].median + (timings["selection"].median if "selection" in calls else 0)
            yield Row(
                method=method.name,
                target=target,
                chosen=judge(chosen, truths, region),
                forced=forced,
                selection=timings.get("selection"),
                attention=timings["attention"],
                ratio=spent / timings["full"].median,
                memory=peak_memory(lambda select=select: attend(first, select(), region), device),
            )


def nearest_options(
    method: Method, maps: Maps, region: tuple[int, int], target: float, known: dict[str, float]
) -> dict | None:
    """The options with which the method comes nearest to a density; None where that is too far from it.

    `known` keeps densities by method and options.
    """
    found = []
    for options in method.options(target, maps, region):
        key = f"{method.name} {options}"
        if key not in known:
            known[key] = density_of(method.choose(maps, region, **options), maps, region)
        density = known[key]
        found.append((max(density / target, target / density), len(found), options))
    factor, _, options = min(found)
    return options if factor <= _NEAR else None


def judge(choices: Sequence[Choice], truths: Sequence[Truth], region: tuple[int, int]) -> Quality:
    """The quality over all photographs."""
    densities, errors, norms, masses, recalls = [], [], [], [], []
    for choice, truth in zip(choices, truths):
        out, lse = attend(truth.maps, choice, region)
        densities.append(density_of(choice, truth.maps, region))
        errors.append((out - truth.out).square().sum())
        norms.append(truth.out.square().sum())
        if lse is not None:
            masses.append((lse - truth.lse).exp().mean().item())
        if choice.lists is not None and choice.blocks is None and choice.region is None:
            recalls.append(_recall(choice, truth, region))
    return Quality(
        density=sum(densities) / len(densities),
        error=(torch.stack(errors).sum() / torch.stack(norms).sum()).sqrt().item(),
        mass=sum(masses) / len(masses) if masses else None,
        recall=sum(recalls) / len(recalls) if recalls else None,
    )


def _recall(choice: Choice, truth: Truth, region: tuple[int, int]) -> float:
    """The share of the true best regions, as many as are listed, that are listed."""
    mass = truth.mass
    if choice.rows is None:
        height, width = truth.maps.q.shape[1:3]
        mass = mass.unflatten(2, (height // region[0], region[0], width // region[1], region[1]))
        mass = mass.mean((3, 5)).flatten(2, 3)
    assert choice.lists is not None
    listed = listed_regions(choice.lists, mass.shape[-1]).expand_as(mass)
    count = listed.sum(-1, keepdim=True)
    best = mass.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1) < count
    return ((best & listed).sum(-1) / count.squeeze(-1).clamp(min=1)).mean().item()


def page(rows: Sequence[Row], claims: Sequence[str] = ()) -> Page:
    """Name the columns of these lines, and explain them."""
    return Page(
        "Selectors of sparse attention at equal densities",
        (
            "method",
            "asked",
            "density",
            "error",
            "mass",
            "recall",
            "density, own",
            "error, own",
            "mass, own",
            "selection",
            "attention",
            "of full",
            "memory",
        ),
        "Density: pairs of pixels compared, as a share of all; methods that take what density their data or "
        "sizes give stand where they are near. Error: of the output, relative to full attention. Mass: share "
        "of the full attention's weights on what is listed. Recall: share of the regions with the most "
        "mass, as many as are listed, that are listed. Own: the same with the own region of every query "
        "forced onto its list. Time: median, ± the difference of the quartiles; of full: selection and "
        "attention divided by PyTorch's attention among all pixels, in the same rounds. Memory: the most "
        "that PyTorch allocates at one time for selection and attention.",
        claims,
    )


def plot(rows: Sequence[Row], file: Path) -> None:
    """Draw error against density, the own region forced where that is to be had."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6))
    markers = "os^vD<>pP*Xd"
    for number, method in enumerate(dict.fromkeys(row.method for row in rows)):
        found = [row.forced or row.chosen for row in rows if row.method == method]
        points = sorted((x.density, x.error) for x in found)
        style = {"marker": markers[number % len(markers)], "color": pyplot.get_cmap("tab20")(number % 20)}
        axes.plot(*zip(*points), label=method, markersize=5, linewidth=1, **style)
    axes.set(
        xscale="log", yscale="log", xlabel="density: share of all pairs of pixels", ylabel="relative error"
    )
    axes.set_xticks(DENSITIES, [f"1/{1 / x:.0f}" for x in DENSITIES])
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(file, dpi=110, bbox_inches="tight")
    pyplot.close(figure)
