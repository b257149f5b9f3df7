"""What works with the networks, tried, and the table of it in docs/compatibility.md.

A row of the table is a miniature of a family, a column a use of it. Every use is a function here that raises
where it fails. A failure needs a sentence in `REASONS`; without one it is a fault.
"""

from __future__ import annotations

import copy
import platform
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from families import FAMILIES, small
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim.swa_utils import AveragedModel

from visionattn.files import replacing

Case = tuple[nn.Module, Tensor]


class Use(NamedTuple):
    """A column of the table.

    Attributes:
        check: uses a network on an image, and raises where that fails.
        meaning: what was tried, for the legend.
    """

    check: Callable[[nn.Module, Tensor], object]
    meaning: str


def case(name: str) -> Case:
    """The miniature of a family and two images."""
    net = small(name).eval()
    cfg = net.pretrained_cfg
    size = net.img_size if cfg["fixed_input_size"] else (24, 32) if hasattr(net, "info") else (64, 96)
    channels = net.info.channels if hasattr(net, "info") else net.in_chans
    return net, torch.rand(2, channels, *size, generator=torch.Generator().manual_seed(0))


def other_size(net: nn.Module, x: Tensor) -> Tensor:
    """Three images of another size, where the network takes another."""
    size = x.shape[2:] if net.pretrained_cfg["fixed_input_size"] else (x.shape[2] + 9, x.shape[3] + 16)
    return torch.rand(3, x.shape[1], *size, generator=torch.Generator().manual_seed(1))


def same(out: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Raise where two outputs differ by more than a share of the largest number."""
    assert out.shape == expected.shape, f"shape {tuple(out.shape)} instead of {tuple(expected.shape)}"
    difference = (out.float() - expected.float()).abs().max() / expected.float().abs().max()
    assert difference <= tolerance, f"the outputs differ by {difference:.1e} of the largest"


def _deepcopy(net: nn.Module, x: Tensor) -> None:
    same(copy.deepcopy(net)(x), net(x), 0.0)


def _ema(net: nn.Module, x: Tensor) -> None:
    averages = (AveragedModel(net, use_buffers=True), ModelEmaV3(net, decay=0.5))
    expected = net(x)
    averages[0].update_parameters(net)
    averages[1].update(net)
    for average in averages:
        same(average.eval()(x), expected)


def _fx(net: nn.Module, x: Tensor) -> None:
    same(torch.fx.symbolic_trace(net)(x), net(x))


def _vmap(net: nn.Module, x: Tensor) -> None:
    same(torch.vmap(lambda image: net(image[None])[0])(x), net(x))


def _vmap_weights(net: nn.Module, x: Tensor) -> None:
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.1)
    weights, buffers = torch.func.stack_module_state([net, twin])
    out = torch.vmap(lambda *state: torch.func.functional_call(net, state, (x,)))(weights, buffers)
    same(out, torch.stack([net(x), twin(x)]))


def _quantise(net: nn.Module, x: Tensor) -> None:
    linear = sum(isinstance(m, nn.Linear) for m in net.modules())
    quantised = torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8)
    found = sum(type(m) is torch.ao.nn.quantized.dynamic.Linear for m in quantised.modules())
    assert found == linear, f"{found} of {linear} linear layers were swapped"
    out = quantised(x)
    assert out.shape == net(x).shape
    assert out.isfinite().all()


class LowRank(nn.Module):
    """An adapter: it wraps a layer, keeps its `weight` and `bias`, and adds a product of low rank."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base_layer = base
        out, rest = base.weight.shape[0], base.weight[0].numel()
        self.a = nn.Parameter(torch.randn(2, rest, dtype=base.weight.dtype) * 0.1)
        self.b = nn.Parameter(torch.randn(out, 2, dtype=base.weight.dtype) * 0.1)

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def difference(self) -> Tensor:
        """What it adds to the weight."""
        return (self.b @ self.a).view(self.weight.shape)

    def forward(self, x: Tensor) -> Tensor:
        """What the layer gives, and the product."""
        base: Any = self.base_layer
        if isinstance(base, nn.Linear):
            return base(x) + F.linear(x, self.difference())
        convolve = getattr(F, f"conv{base.weight.dim() - 2}d")
        settings = base.stride, base.padding, base.dilation, base.groups
        return base(x) + convolve(x, self.difference(), None, *settings)


LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def adapted(net: nn.Module) -> dict[str, LowRank]:
    """Wrap all linear layers and convolutions of a network in adapters."""
    layers = {name: module for name, module in net.named_modules() if isinstance(module, LAYERS)}
    for name, module in layers.items():
        parent, _, leaf = name.rpartition(".")
        setattr(net.get_submodule(parent), leaf, LowRank(module))
    return {name: net.get_submodule(name) for name in layers}  # type: ignore[misc]


def merged(net: nn.Module, adapters: Mapping[str, LowRank]) -> nn.Module:
    """A copy of a network without adapters whose weights hold what these add."""
    copied = copy.deepcopy(net)
    with torch.no_grad():
        for name, adapter in adapters.items():
            copied.get_submodule(name).weight.add_(adapter.difference())
    return copied


def _lora(net: nn.Module, x: Tensor) -> None:
    # In float64 no rounding decides which regions attend to which.
    net, x = copy.deepcopy(net).double(), x.double()
    wrapped = copy.deepcopy(net)
    torch.manual_seed(0)
    adapters = adapted(wrapped)
    same(wrapped(x), merged(net, adapters)(x))


@contextmanager
def one_process() -> Iterator[None]:
    """A group of this process alone: parameters are dealt out and gathered as with many."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _fsdp(net: nn.Module, x: Tensor) -> None:
    expected, sharded = net(x), copy.deepcopy(net)
    with one_process():
        mesh = init_device_mesh("cpu", (1,))
        for module in reversed(list(sharded.modules())):
            if isinstance(module, (nn.Sequential, nn.ModuleList)):
                for block in module.children():
                    if any(True for _ in block.children()):
                        fully_shard(block, mesh=mesh)
        out = fully_shard(sharded, mesh=mesh)(x)
        same(out, expected)
        out.square().mean().backward()


def replica(net: nn.Module) -> nn.Module:
    """What `DataParallel` makes of a network on each of its devices: copies of tensors, no parameters."""
    copies: dict[nn.Module, Any] = {m: m._replicate_for_data_parallel() for m in net.modules()}
    for module, twin in copies.items():
        for name, child in module._modules.items():
            twin._modules[name] = None if child is None else copies[child]
        for name, p in module._parameters.items():
            if p is None:
                twin._parameters[name] = None
            else:
                setattr(twin, name, p.clone())
        for name, buffer in module._buffers.items():
            twin._buffers[name] = None if buffer is None else buffer.clone()
    return copies[net]


def _data_parallel(net: nn.Module, x: Tensor) -> None:
    def gradients() -> Tensor:
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in net.parameters()]
        net.zero_grad()
        return torch.cat([grad.flatten() for grad in found])

    expected = net(x)
    expected.square().mean().backward()
    wanted, replicas = gradients(), [replica(net), replica(net)]
    with ThreadPoolExecutor(2) as pool:
        out = torch.cat(list(pool.map(lambda pair: pair[0](pair[1]), zip(replicas, x.split(1)))))
    same(out, expected)
    out.square().mean().backward()
    same(gradients(), wanted, 1e-4)


def _channels_last(net: nn.Module, x: Tensor) -> None:
    moved: Any = copy.deepcopy(net)
    moved.to(memory_format=torch.channels_last)
    same(moved(x.contiguous(memory_format=torch.channels_last)), net(x))


def _in(dtype: torch.dtype) -> Callable[[nn.Module, Tensor], None]:
    def check(net: nn.Module, x: Tensor) -> None:
        out = copy.deepcopy(net).to(dtype)(x.to(dtype))
        assert out.dtype == dtype, f"the output is {out.dtype}"
        assert out.isfinite().all(), "the output is not finite"
        difference = (out.float() - net(x)).norm() / net(x).norm()
        assert difference <= 0.1, f"the output differs by {difference:.0%}"

    return check


def _threads(net: nn.Module, x: Tensor) -> None:
    inputs = [x, other_size(net, x)]
    usual, ready = sys.getswitchinterval(), threading.Barrier(4)
    with torch.inference_mode():
        expected = [net(x) for x in inputs]

    def serve(number: int) -> None:
        ready.wait()
        with torch.inference_mode():
            for turn in range(3):
                which = (number + turn) % 2
                same(net(inputs[which]), expected[which], 0.0)

    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(serve, range(4)))
    finally:
        sys.setswitchinterval(usual)


def _empty(net: nn.Module, x: Tensor) -> None:
    expected, out = net(x), net(x[:0])
    assert tuple(out.shape) == (0, *expected.shape[1:]), f"the output has shape {tuple(out.shape)}"


USES: dict[str, Use] = {
    "deepcopy": Use(_deepcopy, "`copy.deepcopy`"),
    "EMA": Use(_ema, "`torch.optim.swa_utils.AveragedModel` and timm's `ModelEmaV3`"),
    "fx": Use(_fx, "`torch.fx.symbolic_trace`"),
    "vmap": Use(_vmap, "`torch.vmap` over images"),
    "vmap of weights": Use(
        _vmap_weights, "`torch.vmap` of `torch.func.functional_call` over the weights of two networks"
    ),
    "quantise": Use(_quantise, "`torch.ao.quantization.quantize_dynamic`: every linear layer is swapped"),
    "LoRA": Use(_lora, "adapters around every linear layer and convolution act as merged weights do"),
    "FSDP": Use(_fsdp, "`fully_shard` of every block, forward and backward, one process"),
    "DataParallel": Use(_data_parallel, "`DataParallel`'s replicas in two threads, forward and backward"),
    "channels_last": Use(_channels_last, "`to(memory_format=torch.channels_last)`, network and images"),
    "half": Use(_in(torch.float16), "network and images in float16, within 10 % of float32"),
    "bf16": Use(_in(torch.bfloat16), "the same in bfloat16"),
    "threads": Use(_threads, "four threads and two sizes at once give what one thread gives"),
    "batch 0": Use(_empty, "no images give no outputs"),
}

# Why a use fails, by its name and the beginning of the names of networks: the first that fits counts.
REASONS: dict[tuple[str, str], str] = {
    ("fx", ""): "The networks ask for the size of the image before they compute, which `torch.fx` does not "
    "know while it traces; `torch.export` traces them, and single kernels are leaves of `torch.fx`.",
    ("half", "fcaformer"): "As initialised, its features lie below the smallest numbers of half precision.",
}


def result(name: str, use: str) -> str:
    """`"yes"`, or why the use of a network fails.

    Raises:
        AssertionError: it fails, and nobody has said why.
    """
    torch.manual_seed(0)
    net, x = case(name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            USES[use].check(net, x)
    except Exception as error:
        for (column, start), reason in REASONS.items():
            if column == use and name.startswith(start):
                return reason
        raise AssertionError(f"{use} of {name} fails without a reason in REASONS: {error}") from error
    return "yes"


def read_table(path: Path) -> dict[tuple[str, str], str]:
    """The results that a file of `write_table` tells, by network and use."""
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    notes = dict(line.split(". ", 1) for line in lines if line[:1].isdigit())
    _, *uses = rows[0]
    cells = {
        (row[0].strip("`"), use): cell for row in rows[2:] for use, cell in zip(uses, row[1:], strict=True)
    }
    return {key: notes[cell[4:-1]] if cell != "yes" else cell for key, cell in cells.items()}


def write_table(results: Mapping[tuple[str, str], str], path: Path) -> None:
    """Write results by network and use as Markdown, reasons below."""
    names, uses = dict.fromkeys(n for n, _ in results), dict.fromkeys(u for _, u in results)
    reasons: dict[str, int] = {}

    def cell(text: str) -> str:
        return text if text == "yes" else f"no [{reasons.setdefault(text, len(reasons) + 1)}]"

    lines = [["network", *uses], ["---"] * (1 + len(uses))]
    lines += [[f"`{name}`", *(cell(results[name, use]) for use in uses)] for name in names]
    text = _TEXT.format(
        table="\n".join(f"| {' | '.join(line)} |" for line in lines),
        notes="\n".join(f"{number}. {reason}" for reason, number in reasons.items()),
        meanings="\n".join(f"- **{use}**: {USES[use].meaning}." for use in uses),
        versions=f"torch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()}",
    )
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


_TEXT = """# What works with these networks

One network of every family, small, on a CPU. "yes": tried, with the outputs of the plain network. What
exports and compiles ahead of time says [export.md](export.md).

{table}

{notes}

{meanings}

Made by `PYTHONPATH=. python tests/models/compatibility.py docs/compatibility.md` with
{versions}; with names of networks it makes their rows anew. The tests try every cell again.
"""


def main(arguments: Sequence[str]) -> None:
    """Write the table, or make only the rows of the networks that are named."""
    torch.set_num_threads(1)
    path, names = Path(arguments[0]), arguments[1:] or FAMILIES
    known = read_table(path) if path.exists() else {}
    for name in names:
        known |= {(name, use): result(name, use) for use in USES}
    write_table({(name, use): known[name, use] for name in FAMILIES for use in USES}, path)


if __name__ == "__main__":
    main(sys.argv[1:])
