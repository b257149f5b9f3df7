"""timm's networks with our kernels: the same numbers in every mode, and back again."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from typing import Any

import pytest
import timm
import torch
from timm.layers.halo_attn import HaloAttn
from timm.models.maxxvit import PartitionAttentionCl
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn

import visionattn
from benchmarks.models import compare_models
from visionattn.integrations.timm_windows import FusedWindowAttention
from visionattn.layers.linear import Linear

_SWIN = {"embed_dim": 24, "num_heads": (1, 2, 3, 4), "depths": (2, 2, 2, 2)}
_MAXVIT = {"embed_dim": (32, 32, 64, 64), "depths": (1, 1, 1, 1), "stem_width": 16}
_COATNET = {"embed_dim": (32, 32, 64, 64), "depths": (1, 1, 2, 2), "stem_width": 16}
_SHVIT = {"embed_dim": (32, 48, 64), "partial_dim": (8, 18, 24), "depth": (1, 2, 1)}
_DAVIT = {"embed_dims": (24, 48, 72, 96), "num_heads": (1, 2, 3, 4), "depths": (1, 1, 1, 1)}

#: Every structure: registered name, arguments, input size.
STRUCTURES: dict[str, tuple[str, dict[str, Any], tuple[int, int]]] = {
    "swin": ("swin_tiny_patch4_window7_224", {**_SWIN, "img_size": 112}, (112, 112)),
    "swin, filled up": ("swin_tiny_patch4_window7_224", {**_SWIN, "img_size": (132, 100)}, (132, 100)),
    "swin, shifted on one axis": (
        "swin_tiny_patch4_window7_224",
        {**_SWIN, "img_size": (28, 124)},
        (28, 124),
    ),
    "swin, any size": (
        "swin_tiny_patch4_window7_224",
        {**_SWIN, "strict_img_size": False, "always_partition": True},
        (76, 140),
    ),
    "swin, windows by stage": ("swin_s3_tiny_224", {**_SWIN, "img_size": 148}, (148, 148)),
    "swinv2": ("swinv2_tiny_window8_256", {**_SWIN, "img_size": 128}, (128, 128)),
    "swinv2, filled up": ("swinv2_tiny_window8_256", {**_SWIN, "img_size": (132, 100)}, (132, 100)),
    "swinv2, other windows": ("swinv2_base_window12to16_192to256", {**_SWIN, "img_size": 160}, (160, 160)),
    "maxvit_tf": ("maxvit_tiny_tf_224", {**_MAXVIT, "img_size": (96, 160)}, (96, 160)),
    "maxvit_rw": ("maxvit_pico_rw_256", {**_MAXVIT, "img_size": (160, 96)}, (160, 96)),
    "maxvit_rmlp": ("maxvit_rmlp_pico_rw_256", {**_MAXVIT, "img_size": 96}, (96, 96)),
    "maxvit_pm": ("maxvit_tiny_pm_256", {**_MAXVIT, "img_size": 96}, (96, 96)),
    "maxvit, channels first": (
        "maxvit_pico_rw_256",
        {**_MAXVIT, "img_size": 96, "transformer_use_nchw_attn": True},
        (96, 96),
    ),
    "maxxvitv2": ("maxxvitv2_nano_rw_256", {**_MAXVIT, "img_size": 96}, (96, 96)),
    "coatnet": ("coatnet_0_224", {**_COATNET, "img_size": (96, 160)}, (96, 160)),
    "coatnet_rw": ("coatnet_nano_rw_224", {**_COATNET, "img_size": 96}, (96, 96)),
    "coatnet_rmlp": ("coatnet_rmlp_nano_rw_224", {**_COATNET, "img_size": 96}, (96, 96)),
    "davit": ("davit_tiny", _DAVIT, (132, 100)),
    "davit_fl": ("davit_base_fl", _DAVIT, (132, 100)),
    "shvit": ("shvit_s1", _SHVIT, (140, 200)),
}
#: The structures in which everything is tested, not only the outputs.
TYPICAL = ("swin, filled up", "swinv2, filled up", "maxvit_tf", "maxvit_pm", "coatnet_rw", "davit", "shvit")
#: What is swapped on a GPU, which must be right on the CPU too, and what is swapped there.
DEVICES = ("cuda", "cpu")


def randomised(model: nn.Module) -> nn.Module:
    """A network whose output depends on all of its parts: many weights start at zero or nearly so."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "bias_table" in name or "_rel" in name or p.dim() == 1:
                p.add_(torch.randn_like(p) * (0.1 if p.dim() == 1 else 0.5))
    return model


def pair(structure: str, device: str, **kwargs: Any) -> tuple[nn.Module, nn.Module, Tensor]:
    """timm's network, the same accelerated, and an input."""
    name, arguments, size = STRUCTURES[structure]
    theirs = randomised(timm.create_model(name, num_classes=10, **{**arguments, **kwargs})).eval()
    ours = copy.deepcopy(theirs)
    visionattn.accelerate(ours, device)
    return theirs, ours, torch.randn(2, 3, *size)


def assert_equal(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@torch.no_grad()
def without_attention(model: nn.Module, x: Tensor) -> Tensor:
    model = copy.deepcopy(model)
    for name, p in model.named_parameters():
        if ("attn" in name or "mixer" in name) and ".proj." in name:
            p.zero_()
    return model(x)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("structure", STRUCTURES)
@torch.no_grad()
def test_outputs_are_timms(structure: str, device: str) -> None:
    theirs, ours, x = pair(structure, device)
    expected = theirs(x)
    assert_equal(ours(x), expected)
    with pytest.raises(AssertionError):  # the inputs would show a difference
        assert_equal(without_attention(ours, x), expected, 1e-2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("structure", TYPICAL)
def test_training_is_timms(structure: str, device: str) -> None:
    """Outputs, and gradients of the input and of every parameter, with all that is random in training."""
    # timm's SHViT has no stochastic depth.
    rates = {"drop_rate": 0.1} if structure == "shvit" else {"drop_rate": 0.1, "drop_path_rate": 0.2}
    theirs, ours, x = pair(structure, device, **rates)
    if structure == "shvit":  # batch norms of a few pixels magnify roundings
        theirs, ours, x = theirs.double(), ours.double(), x.double()
    gradients = []
    for net in (theirs.train(), ours.train()):
        torch.manual_seed(1)
        image = x.clone().requires_grad_()
        out = net(image)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        gradients.append(
            {"output": out, "input": image.grad, **{n: p.grad for n, p in net.named_parameters()}}
        )
    expected, found = gradients
    assert {name for name, grad in found.items() if grad is None} == {
        name for name, grad in expected.items() if grad is None
    }
    largest = max(grad.abs().max() for grad in expected.values() if grad is not None)
    for name, grad in expected.items():
        if grad is not None:
            error, size = (found[name] - grad).abs().max(), grad.abs().max()
            assert error <= 1e-4 * size + 1e-6 * largest, name


@pytest.mark.parametrize("structure", TYPICAL)
def test_names_stay_and_everything_is_undone(structure: str) -> None:
    theirs, ours, x = pair(structure, "cuda")
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        with torch.no_grad():
            assert torch.equal(copied(x), ours(x))
    visionattn.decelerate(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in theirs.modules()]
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize(
    ("structure", "indices"), [("swin", None), ("maxvit_tf", None), ("coatnet_rw", (3, 4)), ("davit", None)]
)
@torch.no_grad()
def test_features_only(structure: str, indices: tuple[int, ...] | None) -> None:
    name, arguments, size = STRUCTURES[structure]
    theirs = randomised(timm.create_model(name, features_only=True, out_indices=indices, **arguments)).eval()
    ours = copy.deepcopy(theirs)
    assert visionattn.accelerate(ours, "cuda").swapped
    x = torch.randn(1, 3, *size)
    for mine, expected in zip(ours(x), theirs(x), strict=True):
        assert_equal(mine, expected)


@pytest.mark.parametrize(
    "structure",
    # tracing takes seconds
    ["swin, filled up", *(pytest.param(s, marks=pytest.mark.slow) for s in ("maxvit_tf", "davit", "swinv2"))],
)
@torch.no_grad()
def test_compiled(structure: str) -> None:
    theirs, ours, x = pair(structure, "cuda")
    compiled: Any = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert_equal(compiled(x), theirs(x))


@pytest.mark.parametrize("structure", ["swin", "swinv2", "maxvit_tf", "davit"])
@torch.no_grad()
def test_under_autocast(structure: str) -> None:
    theirs, ours, x = pair(structure, "cuda")
    exact = theirs(x)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = ours(x).float(), theirs(x).float()
    # The largest of few roundings is a matter of luck; their norm is not.
    assert (found - exact).norm() <= 1.5 * (expected - exact).norm()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "structure", ["swin", "swinv2", "maxvit_rw", "maxvit_pm", "maxvit, channels first", "coatnet"]
)
def test_attention_dropout_stays(structure: str, device: str) -> None:
    """No kernel drops weights: timm's formulation runs in training, ours otherwise."""
    name = "attn_drop_rate" if structure.startswith("swin") else "transformer_attn_drop"
    theirs, ours, x = pair(structure, device, **{name: 0.4})
    with torch.no_grad():
        assert_equal(ours(x), theirs(x))
    outputs = []
    for net in (theirs.train(), ours.train()):
        torch.manual_seed(1)
        outputs.append(net(x))
    assert_equal(outputs[1], outputs[0])
    assert (outputs[0] - theirs.eval()(x)).abs().max() > 1e-2 * outputs[0].abs().max()


@pytest.mark.parametrize(
    "form", ["", "wide values", "scaled embedding", "strided", "strided blocks of 7", "pooled"]
)
def test_halo_attention(form: str) -> None:
    kwargs: dict[str, Any] = {
        "": {},
        "wide values": {"dim_head": 8, "num_heads": 2},
        "scaled embedding": {"scale_pos_embed": True},
        "strided": {"stride": 2},
        "strided blocks of 7": {"stride": 2, "block_size": 7},
        "pooled": {"stride": 2, "avg_down": True},
    }[form]
    theirs = HaloAttn(32, 48, **{"num_heads": 4, "block_size": 8, "halo_size": 3, **kwargs})
    theirs.pos_embed.height_rel.data.normal_()
    theirs.pos_embed.width_rel.data.normal_()
    ours = copy.deepcopy(theirs)
    assert visionattn.accelerate(ours, "cuda").swapped == {"": "FusedHaloAttn"}
    side = theirs.block_size
    x = torch.randn(2, 32, 2 * side, 3 * side, requires_grad=True)
    expected, found = theirs(x), ours(x)
    assert_equal(found, expected)
    weight = torch.randn_like(expected)
    grads = [
        torch.autograd.grad((out * weight).sum(), [x, *net.parameters()])
        for net, out in ((theirs, expected), (ours, found))
    ]
    for mine, grad in zip(*reversed(grads), strict=True):
        assert_equal(mine, grad, 1e-4)
    with pytest.raises(ValueError, match="needs whole"):
        ours(x[..., 1:])


@torch.no_grad()
def test_halonet() -> None:
    theirs = randomised(timm.create_model("halonet26t")).eval()
    x = torch.randn(1, 3, 256, 256)
    for device in DEVICES:
        ours = copy.deepcopy(theirs)
        report = visionattn.accelerate(ours, device)
        kinds = Counter(report.swapped.values())
        assert kinds == (
            {"FusedHaloAttn": 3} if device == "cuda" else {"FusedHaloAttn": 2, "OneDnnLinear": 1}
        )
        assert_equal(ours(x), theirs(x))


def test_report() -> None:
    model = timm.create_model("davit_tiny", **_DAVIT)
    before = [type(m) for m in model.modules()]
    report = visionattn.accelerate(model, "cuda")
    assert len(report.swapped) == len(report.kept) == 4
    assert all(model.get_submodule(name).__class__.__name__ == kind for name, kind in report.swapped.items())
    assert str(report) == (
        "swapped: 4 x FusedSpatialBlock\nkept: 4 x attention across channels, for which there is no kernel"
    )
    report = visionattn.accelerate(model)  # for the CPU, where the parameters are
    assert set(report.swapped.values()) == {"OneDnnLinear"}
    assert set(report.kept.values()) == {
        "attention across channels, for which there is no kernel",
        "timm's own formulation is as fast on the CPU",
    }
    report.undo()
    assert [type(m) for m in model.modules()] == before
    assert "nothing to swap" in str(visionattn.accelerate(nn.Conv2d(2, 2, 1)))


def test_decelerate_leaves_our_own_networks_alone() -> None:
    ours = timm.create_model("nat_mini", depths=(1, 1, 1, 1))
    before = [type(m) for m in ours.modules()]
    visionattn.accelerate(ours)
    # By identity: our layer counts as equal to PyTorch's.
    own = [kind is Linear for kind in before]
    assert own == [type(m) is Linear for m in ours.modules()]
    assert any(own)
    visionattn.decelerate(ours)
    assert [type(m) for m in ours.modules()] == before


def test_foreign_blocks_are_left_alone() -> None:
    class Changed(PartitionAttentionCl):
        pass

    name, arguments, _ = STRUCTURES["maxvit_tf"]
    model = timm.create_model(name, **arguments)
    block: Any = model.get_submodule("stages.0.blocks.0.attn_grid")
    block.__class__ = Changed
    report = visionattn.accelerate(model, "cuda")
    assert report.kept == {"stages.0.blocks.0.attn_grid": "Changed is not timm's own PartitionAttentionCl"}
    assert len(report.swapped) == 7


def registered() -> list[str]:
    files = ("swin_transformer", "swin_transformer_v2", "maxxvit", "davit", "shvit")
    names = timm.list_models()
    return [
        n for n in names if timm.model_entrypoint(n).__module__.rpartition(".")[2] in files or "halo" in n
    ]


@pytest.mark.slow  # a hundred networks at their published widths and sizes
@pytest.mark.parametrize("name", registered())
@torch.no_grad()
def test_every_registered_network(name: str) -> None:
    shallow = {"swin": (2, 2, 2, 2), "maxv": (1, 1, 1, 1), "maxx": (1, 1, 1, 1), "davi": (1, 1, 1, 1)}
    arguments = {"depths": shallow[name[:4]]} if name[:4] in shallow else {}
    theirs = randomised(timm.create_model(name, num_classes=10, **arguments)).eval()
    x = torch.randn(1, *theirs.default_cfg["input_size"])  # pyright: ignore
    expected = theirs(x)
    for device in DEVICES:
        report = visionattn.accelerate(theirs, device)
        assert report.swapped or report.kept
        assert_equal(theirs(x), expected)


def test_benchmark_compares_with_timm_as_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for attention in (WindowAttention, FusedWindowAttention):

        def forward(
            self: nn.Module, x: Tensor, own: Any = attention.forward, of: Any = attention, **mask: Any
        ) -> Tensor:
            calls.append(of)
            return own(self, x, **mask)

        monkeypatch.setattr(attention, "forward", forward)
    (row,) = compare_models(["swin_tiny_patch4_window7_224"], repeats=1)
    assert (row.input, row.mode) == ((1, 3, 224, 224), "inference")
    assert row.difference < 1e-5
    assert calls.count(WindowAttention) == calls.count(FusedWindowAttention) > 0
