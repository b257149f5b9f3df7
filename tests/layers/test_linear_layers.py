"""Plug-in layers of linear attention: any map size, batches, gradients; and the biases that agents keep."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from visionattn.layers import AgentAttention2d, InLineAttention2d, LinearAttention2d, WindowAttention2d

LAYERS = {
    "agent": lambda: AgentAttention2d(16, 2, size=(6, 6), agents=2),
    "agent_regrid": lambda: AgentAttention2d(16, 2, size=(6, 6), agents=2, agent_shape=(3, 4)),
    "inline": lambda: InLineAttention2d(16, 2),
    "inline_static": lambda: InLineAttention2d(16, 2, static_conv=True),
    "linear": lambda: LinearAttention2d(16, 2, floor=0.1),
    "window": lambda: WindowAttention2d(16, 2, 4, shift=2),
    "window_plain": lambda: WindowAttention2d(16, 2, 4, relative_bias=False),
}


def layer(name: str) -> nn.Module:
    torch.manual_seed(0)
    return LAYERS[name]()


def agents(prefix: bool = False) -> AgentAttention2d:
    torch.manual_seed(0)
    net = AgentAttention2d(16, 2, size=(6, 5), agents=2, agent_shape=(3, 4), prefix=prefix)
    for name, parameter in net.named_parameters():
        if name.endswith("_bias"):  # as large as the logits, so that a wrong one cannot hide
            nn.init.normal_(parameter)
    return net.eval()


@pytest.mark.parametrize("size", [(6, 6), (7, 10), (1, 3)], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_any_size_and_gradients(name, size):
    net = layer(name)
    x = torch.randn(2, *size, 16, requires_grad=True)
    out = net(x)
    assert out.shape == x.shape
    out.square().sum().backward()
    for parameter in (x, *net.parameters()):
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("name", LAYERS)
def test_images_of_a_batch_do_not_see_each_other(name):
    net = layer(name).eval().double()
    x = torch.randn(3, 7, 5, 16, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(net(x), torch.cat([net(image[None]) for image in x]))


@pytest.mark.parametrize(
    "make", [lambda: agents(prefix=False), lambda: layer("inline")], ids=["agent", "inline"]
)
def test_tokens_with_a_size_are_the_map(make):
    net = make().eval()
    x = torch.randn(2, 7, 5, 16)
    torch.testing.assert_close(net(x.flatten(1, 2), (7, 5)), net(x).flatten(1, 2))
    with pytest.raises(ValueError, match=r"need the \(H, W\) of their map"):
        net(x.flatten(1, 2))
    with pytest.raises(ValueError, match=r"need the \(H, W\) of their map"):
        net(x.flatten(1, 2), (8, 5))


def test_agent_biases_follow_the_published_order():
    """Sum of lines, resized as a map; then the grid of agents, resized per pixel; coarse tables alike."""
    net, size = agents(), (9, 7)
    heads, side = 2, net.agents

    def published(table: Tensor) -> Tensor:
        table = F.interpolate(table, size=size, mode="bilinear")
        grid = table.reshape(heads, side, side, -1).permute(0, 3, 1, 2)
        return F.interpolate(grid, size=net.agent_shape, mode="bilinear").flatten(2).transpose(1, 2)

    lines_in = (net.ah_bias + net.aw_bias)[0]
    lines_out = (net.ha_bias + net.wa_bias)[0].permute(0, 3, 1, 2)
    bias_in, bias_out = net._resized_biases(size)
    torch.testing.assert_close(bias_in, published(net.an_bias) + published(lines_in))
    torch.testing.assert_close(bias_out, published(net.na_bias) + published(lines_out))


def change_by_loading(net: AgentAttention2d) -> None:
    net.load_state_dict(
        {name: value + 0.5 * torch.randn_like(value) for name, value in net.state_dict().items()}
    )


def change_by_a_move(net: AgentAttention2d) -> None:
    net.to(torch.bfloat16).to(torch.float32)


def change_by_training(net: AgentAttention2d) -> None:
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    net(torch.randn(2, 6, 5, 16)).square().sum().backward()
    optimizer.step()
    net.eval()


def change_in_evaluation(net: AgentAttention2d) -> None:
    with torch.no_grad():
        net.ha_bias.add_(1.0).mul_(torch.randn_like(net.ha_bias))


def change_a_parameter(net: AgentAttention2d) -> None:
    net.an_bias = nn.Parameter(torch.randn_like(net.an_bias))


@pytest.mark.parametrize("no_grad", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "change",
    [change_by_loading, change_by_a_move, change_by_training, change_in_evaluation, change_a_parameter],
)
def test_kept_biases_follow_the_weights(change, no_grad):
    net, x = agents(), torch.randn(2, 9, 7, 16)
    with no_grad():
        before = net(x)
        torch.testing.assert_close(net(x), before, rtol=0, atol=0)
    change(net)
    expected = net(x)  # with gradients nothing is kept
    with no_grad():
        after = net(x)
    assert (after - before).abs().max() > 1e-4
    torch.testing.assert_close(after, expected.detach())


@pytest.mark.parametrize("foreach", [False, True])
def test_kept_biases_follow_averaged_weights(foreach):
    net, x = agents(), torch.randn(1, 9, 7, 16)
    average = ModelEmaV3(net, decay=0.5, foreach=foreach)
    with torch.no_grad():
        before = average.module(x)
    change_by_loading(net)
    average.update(net)
    expected = average.module.train()._resized_biases((9, 7))
    average.module.eval()
    with torch.no_grad():
        average.module(x)
    change_by_loading(net)
    average.update(net)
    with torch.no_grad():
        after = average.module(x)
        torch.testing.assert_close(after, average.module.train()(x))
    assert (after - before).abs().max() > 1e-4
    assert (expected[0] - average.module._resized_biases((9, 7))[0]).abs().max() > 1e-4


def test_kept_biases_follow_the_size():
    net = agents()
    sizes = [(6, 5), (9, 7), (6, 5), (5, 6), (7, 9)]
    for height, width in sizes:
        x = torch.randn(1, height, width, 16)
        expected = net(x)
        with torch.no_grad():
            torch.testing.assert_close(net(x), expected.detach())


def test_biases_are_resized_once(monkeypatch):
    net, x, calls = agents(prefix=True), torch.randn(1, 1 + 63, 16), []
    resize = AgentAttention2d._resized_biases
    monkeypatch.setattr(
        AgentAttention2d, "_resized_biases", lambda self, size: calls.append(size) or resize(self, size)
    )
    with torch.inference_mode():
        for _ in range(3):
            net(x, (9, 7))
    assert calls == [(9, 7)]
    net.train()
    net(x, (9, 7))
    net(x, (9, 7))
    assert len(calls) == 3


def test_a_copy_keeps_its_own_biases():
    net, x = agents(), torch.randn(1, 9, 7, 16)
    with torch.no_grad():
        before = net(x)
        twin = copy.deepcopy(net)
        change_in_evaluation(twin)
        torch.testing.assert_close(net(x), before)
        assert (twin(x) - before).abs().max() > 1e-4


def test_biases_kept_under_inference_mode_serve_a_backward_pass():
    net, x = agents().requires_grad_(False), torch.randn(1, 9, 7, 16)
    with torch.inference_mode():
        net(x)
    x = x.requires_grad_()
    net(x).sum().backward()
    assert x.grad is not None


def test_stale_biases_never_reach_a_gradient():
    net, x = agents(), torch.randn(1, 9, 7, 16)
    with torch.no_grad():
        net(x)
    net(x).sum().backward()
    assert net.an_bias.grad is not None


def test_linear_attention_is_the_published_formula():
    net = layer("linear").double()
    x = torch.randn(1, 4, 5, 16, dtype=torch.float64)
    q, k, v = net.qkv(x).unflatten(-1, (3, 2, 8)).flatten(1, 2).permute(2, 0, 3, 1, 4)
    q, k = q.relu(), k.relu()
    denominator = (q @ k.sum(-2)[..., None]).clamp(min=net.floor)
    out = q @ (k.transpose(-2, -1) @ v * net.temperature) / denominator
    expected = net.proj(out.transpose(1, 2).flatten(2)).view_as(x)
    torch.testing.assert_close(net(x), expected)


def test_windows_shift_on_small_maps_only_where_asked():
    net = WindowAttention2d(16, 2, 4, shift=2).eval()
    twin = copy.deepcopy(net)
    twin.always_shift = True
    small, large = torch.randn(1, 4, 9, 16), torch.randn(1, 5, 9, 16)
    torch.testing.assert_close(twin(large), net(large))
    assert (twin(small) - net(small)).abs().max() > 1e-4
