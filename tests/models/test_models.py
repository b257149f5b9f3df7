"""What every registered network must do, whatever its family: timm's contract and that of restoration."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from families import (
    ALL,
    ANY_SIZE,
    CLASSIFICATION,
    DROP_PATH,
    FAMILIES,
    PARAMETERS,
    RESTORATION,
    SAME_IN_TRAINING,
    SMALL,
    STRUCTURES,
    TOKENS,
    prefix,
    small,
)
from safetensors.torch import load, save
from timm.models import group_parameters
from torch import Tensor, nn

import visionattn

SIZE = (64, 96)
every_name = pytest.mark.parametrize("name", ALL)
every_model = pytest.mark.parametrize("name", STRUCTURES)
every_backbone = pytest.mark.parametrize("name", CLASSIFICATION)
every_restorer = pytest.mark.parametrize("name", RESTORATION)
every_family = pytest.mark.parametrize("name", FAMILIES)


def channels(net: nn.Module) -> int:
    return net.info.channels if hasattr(net, "info") else net.in_chans


def min_size(net: nn.Module) -> int:
    return net.info.min_size if hasattr(net, "info") else net.min_size


def image(net: nn.Module, batch: int = 2, size: tuple[int, int] | None = None, **kwargs: Any) -> Tensor:
    """A random image; for restoration a small one, because it stays at its size throughout."""
    if net.pretrained_cfg["fixed_input_size"]:
        size = net.img_size
    elif size is None:
        size = (16, 24) if hasattr(net, "info") else SIZE
    size = max(size[0], min_size(net)), max(size[1], min_size(net))
    return torch.rand(batch, channels(net), *size, **kwargs)


def expected_shape(net: nn.Module, x: Tensor) -> tuple[int, ...]:
    if hasattr(net, "info"):
        channels = net.info.out_channels or x.shape[1]
        return (x.shape[0], channels, *(side * net.info.upscale for side in x.shape[2:]))
    return x.shape[0], net.num_classes


def gradients(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Gradients of every parameter for a loss that depends on every output."""
    net.zero_grad()
    out = net(x)
    weights = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view_as(out)
    (out * weights).sum().backward()
    missing = [name for name, p in net.named_parameters() if p.grad is None]
    assert not missing, f"no gradient: {missing}"
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def paths(of: str | tuple[str, ...]) -> tuple[str, ...]:
    """The modules that a configuration of timm names, one or several."""
    return of if isinstance(of, tuple) else (of,) if of else ()


def within(indices: tuple[int, ...], stages: int) -> tuple[int, ...]:
    """Stage numbers for a network that may have fewer stages than are asked for."""
    return tuple(dict.fromkeys(min(i, stages - 1) if i >= 0 else max(i, -stages) for i in indices))


def reduction_size(side: int, reduction: int) -> set[int]:
    """Overlapping convolutions round up, disjoint patches round down."""
    return {side // reduction, -(-side // reduction)}


# Build


def test_every_published_network_is_registered():
    assert set(PARAMETERS) == set(ALL)


@every_name
def test_full_size_without_data(name: str):
    net = timm.create_model(name, device="meta").eval()
    assert all(tensor.is_meta for tensor in net.state_dict().values())
    assert sum(p.numel() for p in net.parameters()) == PARAMETERS[name]
    x = image(net, 1, (35, 66) if hasattr(net, "info") else (256, 192), device="meta")
    assert tuple(net(x).shape) == expected_shape(net, x)


@pytest.mark.slow
@every_name
def test_forward_in_full_size(name: str):
    net = timm.create_model(name).eval()
    odd = (35, 66) if hasattr(net, "info") else (256, 192)
    with torch.inference_mode():
        for size in (net.pretrained_cfg["input_size"][1:], odd):
            x = image(net, 1, size)
            out = net(x)
            assert tuple(out.shape) == expected_shape(net, x)
            assert out.isfinite().all()


@every_name
def test_default_cfgs(name: str):
    for tag in [name, *timm.list_models(f"{name}.*", pretrained=True)]:
        cfg = timm.get_pretrained_cfg(tag)
        assert cfg is not None
        assert cfg.license
        assert cfg.paper_ids
        assert cfg.paper_name
        assert cfg.origin_url.startswith("https://")
        assert not cfg.url or cfg.url.startswith("https://")
        assert len(cfg.input_size) == 3
        assert len(cfg.mean) == len(cfg.std) == cfg.input_size[0]
        net = small(tag, device="meta")
        assert cfg.num_classes == net.num_classes
        modules = dict(net.named_modules())
        assert all(isinstance(modules[path], nn.Conv2d) for path in paths(cfg.first_conv))
        assert all(isinstance(modules[path], nn.Linear) for path in paths(cfg.classifier))


@every_family
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_and_device_are_those_of_construction(name: str, dtype: torch.dtype):
    net = small(name, dtype=dtype, device="cpu").eval()
    assert {p.dtype for p in net.parameters()} == {dtype}
    with torch.inference_mode():
        out = net(image(net, dtype=dtype))
    assert out.dtype == dtype
    assert out.isfinite().all()


# Forward and backward


@every_model
@pytest.mark.parametrize("batch", [1, 3])
def test_every_size(name: str, batch: int):
    net = small(name).eval()
    least = min_size(net)
    for size in ((least, least), (least + 5, least), (35, 66), (71, 40)):
        x = image(net, batch, (max(size[0], least), max(size[1], least)))
        with torch.inference_mode():
            out = net(x)
        assert tuple(out.shape) == expected_shape(net, x)
        assert out.isfinite().all()


@every_model
def test_too_small_an_input_is_refused_with_the_smallest_size(name: str):
    net = small(name)
    least = min_size(net)
    for size in ((least - 1, least), (least, least - 1)):
        with pytest.raises(ValueError, match=rf"at least {least} pixels"):
            net(torch.rand(1, channels(net), *size))


@every_model
def test_samples_of_a_batch_do_not_depend_on_each_other(name: str):
    net = small(name).eval()
    x = image(net, 3)
    with torch.inference_mode():
        torch.testing.assert_close(net(x), torch.cat([net(sample[None]) for sample in x]))


@every_model
def test_gradients_reach_every_parameter(name: str):
    # The last block of a network of tokens reaches the class token in part only: all tokens are classified.
    kwargs = {"global_pool": ""} if name in TOKENS else {}
    net = small(name, **kwargs).train()
    for parameter, gradient in gradients(net, image(net)).items():
        assert gradient.isfinite().all(), parameter
        assert gradient.count_nonzero(), parameter


@every_model
def test_implementations_agree(name: str):
    net = small(name, dtype=torch.float64).eval()
    x = image(net, 1, (35, 42), dtype=torch.float64)
    with torch.inference_mode(), visionattn.kernels.use_backend("reference"):
        expected = net(x)
    with torch.inference_mode():
        torch.testing.assert_close(net(x), expected)
    # With gradients recorded, the implementations may take another way.
    torch.testing.assert_close(net(x), expected)


@pytest.mark.parametrize("name", SAME_IN_TRAINING)
def test_training_without_drop_path_differs_from_evaluation_only_by_batch_statistics(name: str):
    net = small(name)
    norms = [module for module in net.modules() if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d))]
    for module in norms:
        module.momentum = None  # the average over all batches: after one, its statistics
    # Of few numbers, the variance that training divides by is visibly smaller than the one that is kept.
    x = image(net, 16 if norms else 4)
    net.train()(x)
    trained, evaluated = net.train()(x), net.eval()(x)
    tolerance = 0.1 if norms else 1e-6
    assert (trained - evaluated).norm() <= tolerance * evaluated.norm()
    torch.testing.assert_close(net(x), evaluated)


@pytest.mark.parametrize("name", DROP_PATH)
def test_drop_path_acts_in_training_only(name: str):
    net, plain = small(name, drop_path_rate=0.9), small(name)
    plain.load_state_dict(net.state_dict())
    x = image(net, 2)
    torch.testing.assert_close(net.eval()(x), plain.eval()(x))
    assert not torch.allclose(net.train()(x), net.train()(x))


@every_model
def test_bfloat16_autocast(name: str):
    net = small(name)
    x = image(net)
    expected = net.eval()(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = net.eval()(x)
        loss = net.train()(x).float().square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    # Routing may fall out differently at a few places where bfloat16 rounds the features before it.
    assert (out - expected).norm() <= 0.1 * expected.norm()


@every_model
def test_gradient_checkpointing_gives_the_same_gradients(name: str):
    net = small(name).train()
    x = image(net)
    expected = gradients(copy.deepcopy(net), x)
    net.set_grad_checkpointing()
    for parameter, gradient in gradients(net, x).items():
        torch.testing.assert_close(gradient, expected[parameter])
    net.set_grad_checkpointing(False)


@every_model
def test_no_memory_of_earlier_inputs(name: str):
    net = small(name).eval()
    small_x, large_x = image(net), image(net, 1, (72, 80))
    with torch.inference_mode():
        expected = net(small_x)
        net(large_x)
        assert torch.equal(net(small_x), expected)


# Parameters


@every_model
def test_state_dict_round_trip(name: str):
    net = small(name).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    twin = small(name).eval()
    twin.load_state_dict(load(save(net.state_dict())))
    x = image(net)
    assert torch.equal(net(x), twin(x))
    assert torch.equal(copy.deepcopy(net)(x), net(x))


@every_model
@pytest.mark.parametrize("coarse", [False, True])
def test_group_matcher_covers_every_parameter(name: str, coarse: bool):
    net = small(name, device="meta")
    groups = group_parameters(net, net.group_matcher(coarse=coarse))
    sorted_in = [parameter for group in groups.values() for parameter in group]
    assert sorted(sorted_in) == sorted(parameter for parameter, _ in net.named_parameters())
    assert len(groups) > 2


@every_model
def test_no_weight_decay_names_parameters(name: str):
    net = small(name, device="meta")
    assert set(net.no_weight_decay()) <= {parameter for parameter, _ in net.named_parameters()}


@every_model
@pytest.mark.parametrize("in_chans", [1, 4])
def test_other_numbers_of_channels(name: str, in_chans: int):
    net = small(name, in_chans=in_chans).eval()
    x = image(net)
    assert x.shape[1] == in_chans
    assert tuple(net(x).shape) == expected_shape(net, x)


# Compilation and export: one variant of every family


@every_family
@pytest.mark.parametrize("training", [False, True])
def test_compile_without_graph_breaks(name: str, training: bool):
    net = small(name).train(training)
    x = image(net)
    torch.compiler.reset()
    compiled = torch.compile(copy.deepcopy(net), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), net(x))


@every_family
def test_export(name: str):
    net = small(name).eval()
    x = image(net)
    program = torch.export.export(net, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch", min=1)}})
    other = image(net, 3)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), net(x))
        torch.testing.assert_close(program.module()(other), net(other))


# Classification backbones


@every_backbone
@pytest.mark.parametrize("out_indices", [None, (0,), (1, 3), (-2, -1), (2,)])
def test_features_only(name: str, out_indices: tuple[int, ...] | None):
    full = small(name).eval()
    stages = len(full.feature_info)
    out_indices = None if out_indices is None else within(out_indices, stages)
    kwargs = {} if out_indices is None else {"out_indices": out_indices}
    net = small(name, features_only=True, **kwargs).eval()
    x = image(full)
    features = net(x)
    # Isotropic networks give their last three blocks, as timm's ViTs do.
    is_isotropic = len({info["reduction"] for info in full.feature_info}) == 1
    default = list(range(stages))[-3 if is_isotropic else 0 :]
    taken = [i % stages for i in out_indices] if out_indices else default
    assert [info["reduction"] for info in full.feature_info] == sorted(
        info["reduction"] for info in full.feature_info
    )
    assert net.feature_info.channels() == [full.feature_info[i]["num_chs"] for i in taken]
    assert net.feature_info.reduction() == [full.feature_info[i]["reduction"] for i in taken]
    for feature, count, reduction in zip(
        features, net.feature_info.channels(), net.feature_info.reduction(), strict=True
    ):
        assert tuple(feature.shape) == (x.shape[0], count, SIZE[0] // reduction, SIZE[1] // reduction)
    modules = dict(full.named_modules())
    assert all(info["module"] in modules for info in full.feature_info)

    full.load_state_dict({**full.state_dict(), **net.model.state_dict()})
    expected = full.forward_intermediates(x, indices=taken, intermediates_only=True)
    for feature, wanted in zip(features, expected, strict=True):
        torch.testing.assert_close(feature, wanted)


@pytest.mark.parametrize("name", [name for name in CLASSIFICATION if name in ANY_SIZE])
def test_features_of_sizes_that_do_not_divide(name: str):
    net = small(name, features_only=True).eval()
    height, width = (max(side, min_size(net.model)) for side in (50, 77))
    for feature, reduction in zip(net(image(net.model, 1, (height, width))), net.feature_info.reduction()):
        assert feature.shape[2] in reduction_size(height, reduction)
        assert feature.shape[3] in reduction_size(width, reduction)


@every_backbone
def test_features_carry_gradients(name: str):
    net = small(name, features_only=True).train()
    sum((i + 1) * feature.square().mean() for i, feature in enumerate(net(image(net.model)))).backward()
    used = {parameter for parameter, p in net.named_parameters() if p.grad is not None and p.grad.any()}
    assert used == {parameter for parameter, _ in net.named_parameters()}


@every_backbone
def test_forward_intermediates(name: str):
    net = small(name).eval()
    x = image(net)
    with torch.inference_mode():
        final, intermediates = net.forward_intermediates(x)
        torch.testing.assert_close(final, net.forward_features(x))
        assert len(intermediates) == len(net.feature_info)

        stages = len(intermediates)
        some = within((0, 2), stages)
        subset = net.forward_intermediates(x, indices=list(some), intermediates_only=True)
        torch.testing.assert_close(subset, [intermediates[i] for i in some])
        last = min(2, stages)
        torch.testing.assert_close(
            net.forward_intermediates(x, indices=last, intermediates_only=True), intermediates[-last:]
        )
        (second,) = within((1,), stages)
        early = net.forward_intermediates(x, indices=[second], stop_early=True, intermediates_only=True)
        torch.testing.assert_close(early, [intermediates[second]])
        *_, normed = net.forward_intermediates(x, norm=True, intermediates_only=True)
        torch.testing.assert_close(normed, final)
    with pytest.raises(ValueError, match="output_fmt"):
        net.forward_intermediates(x, output_fmt="NLC")
    with pytest.raises(AssertionError):
        net.forward_intermediates(x, indices=[17])


@every_backbone
@pytest.mark.parametrize(("indices", "norm"), [([1], False), ([0, 3], False), ([0, 3], True), (1, False)])
def test_prune_intermediate_layers(name: str, indices: int | list[int], norm: bool):
    net, full = small(name).eval(), small(name).eval()
    x = image(net)
    if isinstance(indices, list):
        indices = list(within(tuple(indices), len(net.feature_info)))
    taken = net.prune_intermediate_layers(indices, prune_norm=norm)
    before = sum(p.numel() for p in full.parameters())
    assert sum(p.numel() for p in net.parameters()) < before
    expected = full.forward_intermediates(x, indices=indices, intermediates_only=True)
    torch.testing.assert_close(net.forward_intermediates(x, indices=taken, intermediates_only=True), expected)


@every_backbone
def test_classifier(name: str):
    net = small(name).eval()
    x = image(net)
    features = net.forward_features(x)
    assert features.shape[:2] == (2, net.num_features)
    assert net.head_hidden_size == net.num_features
    pooled = net.forward_head(features, pre_logits=True)
    assert tuple(pooled.shape) == (2, net.num_features)
    torch.testing.assert_close(net.get_classifier()(pooled), net(x))
    torch.testing.assert_close(net.forward_head(features), net(x))

    net.reset_classifier(7)
    assert net.num_classes == 7
    assert tuple(net(x).shape) == (2, 7)
    net.reset_classifier(0)
    torch.testing.assert_close(net(x), pooled)
    net.reset_classifier(0, "")
    torch.testing.assert_close(net(x), features)


@every_backbone
@pytest.mark.parametrize("pool", ["avg", "max", "avgmax"])
def test_global_pool(name: str, pool: str):
    net = small(name, global_pool=pool, num_classes=5).eval()
    assert tuple(net(image(net)).shape) == (2, 5)
    net.reset_classifier(4, "max")
    assert tuple(net(image(net)).shape) == (2, 4)


@every_backbone
def test_without_classifier(name: str):
    net = small(name, num_classes=0).eval()
    x = image(net)
    assert tuple(net(x).shape) == (2, net.num_features)
    maps = small(name, num_classes=0, global_pool="").eval()(x)
    assert maps.shape[:2] == (2, net.num_features)
    assert maps.dim() == 4


@every_backbone
def test_drop_rate_acts_in_training_only(name: str):
    net = small(name, drop_rate=0.5)
    x = image(net)
    assert torch.equal(net.eval()(x), net.eval()(x))
    features = net.forward_features(x)
    net.train()
    assert not torch.equal(net.forward_head(features), net.forward_head(features))


# Restoration networks


@every_restorer
def test_restoration_facts(name: str):
    net = small(name, device="meta")
    info = net.info
    assert info.channels == net.pretrained_cfg["input_size"][0]
    assert info.upscale >= 1
    assert info.min_size >= 1
    assert info.size_multiple >= 1
    assert net.num_classes == 0


@every_restorer
def test_restoration_does_not_change_its_input(name: str):
    net = small(name).eval()
    x = image(net)
    before = x.clone()
    net(x)
    assert torch.equal(x, before)


def test_every_family_has_a_miniature():
    assert set(SMALL) == {prefix(name) for name in ALL}
