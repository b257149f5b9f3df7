"""CATANet: light super-resolution whose pixels attend to those of similar content, wherever they are.

Paper: "CATANet: Efficient Content-Aware Token Aggregation for Lightweight Image Super-Resolution", CVPR 2025,
https://arxiv.org/abs/2503.06896. Official code and weights: https://github.com/EquationWalker/CATANet
(Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import cycle, islice
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import checkpoint, generate_default_cfgs
from torch import Tensor, nn

from visionattn.kernels.precision import at_least_float32, without_autocast
from visionattn.layers.bands import convolved, pixelwise
from visionattn.layers.linear import Linear
from visionattn.layers.maps import mirror_index
from visionattn.layers.overlapping_patches import ConvMlp, HeadProjection, LocalAttention
from visionattn.models.frames.common import check_size, init_linear
from visionattn.models.frames.restorer import (
    RestorationInfo,
    Restorer,
    add_convolved,
    build_restoration,
    run_body,
    super_resolution_cfg,
    upsampler,
    upscale_of,
)
from visionattn.models.registry.names import Names
from visionattn.models.registry.shapes import Guess, Shapes
from visionattn.models.registry.variants import Layout, Variant, Weights, register

__all__ = ["CATANet"]


class TokenAggregation(nn.Module):
    """Attention among pixels that are nearest to the same centre, and to the centres themselves (TAB).

    Pixels are sorted by the centre with the most similar direction, ties by position, and cut into groups; a
    group attends to itself and to the next one. A second softmax attends to all centres.

    Args:
        dim: channels.
        qk_dim: channels of queries and keys.
        num_heads: attention heads.
        hidden_dim: hidden width of the MLP.
        num_centres: centres.
        group_size: pixels in a group.
        iterations: in training, how often the centres move to the mean of their pixels; gradients flow
            through the last time.
    """

    def __init__(
        self,
        dim: int,
        qk_dim: int,
        num_heads: int,
        hidden_dim: int,
        num_centres: int,
        group_size: int,
        iterations: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_centres = num_centres
        self.group_size = group_size
        self.iterations = iterations
        self.norm = nn.LayerNorm(dim, **dd)
        self.qkv = HeadProjection(dim, qk_dim, num_heads, **dd)
        self.centre_kv = HeadProjection(dim, qk_dim, num_heads, with_queries=False, **dd)
        self.proj = Linear(dim, dim, bias=False, **dd)
        self.out = Linear(dim, dim, bias=False, **dd)
        self.mlp = ConvMlp(dim, hidden_dim, **dd)

    def forward(self, x: Tensor, centres: Tensor, initialised: Tensor) -> tuple[Tensor, Tensor]:
        """One step.

        Args:
            x: `[B, H, W, C]`.
            centres: `[centres, C]`.
            initialised: boolean scalar; if False, training begins with means of consecutive pixels instead.

        Returns:
            `[B, H, W, C]`, and the centres that were used, detached; in training they moved to the batch.
        """
        tokens = self.norm(x).flatten(1, 2)
        # Rounding changes which centre is nearest.
        with without_autocast(x):
            if self.training:
                means = self.segment_means(tokens.detach())
                centres = self._refine(tokens, torch.where(initialised, centres, means))
            directions = _unit(centres)
            nearest = pixelwise(lambda tokens: _nearest(_unit(tokens), directions), tokens)
            order = torch.argsort(nearest, dim=-1, stable=True)
        out = self._attend(tokens, order, centres).view_as(x)
        x = pixelwise(lambda x, out: x + self.out(self.proj(out)), x, out, into=out)
        return convolved(lambda x: x + self.mlp(x), x, halo=2), centres.detach()

    def segment_means(self, tokens: Tensor) -> Tensor:
        """Means `[centres, C]` of equal stretches of `[B, N, C]`, as many as there are centres.

        The sequence is filled up by its mirror image, also where their number divides it.
        """
        count, size = self.num_centres, tokens.shape[1]
        index = mirror_index(size, (size // count + 1) * count, tokens.device)
        return tokens.index_select(1, index).unflatten(1, (count, -1)).mean((0, 2))

    def _refine(self, tokens: Tensor, centres: Tensor) -> Tensor:
        tokens = _unit(tokens)
        with torch.no_grad():
            for _ in range(self.iterations - 1):
                centres = _move(tokens, centres)
        return _move(tokens, centres)

    def _attend(self, tokens: Tensor, order: Tensor, centres: Tensor) -> Tensor:
        """Both attentions of `[B, N, C]`; groups are cut from the sequence `order` `[B, N]`."""
        batch, count, dim = tokens.shape
        size = min(count, self.group_size)
        groups = -(-count // size)
        # The last group is filled up, and followed, by the mirror image of the sequence.
        sequence = order[:, mirror_index(count, (groups + 1) * size, order.device)].unflatten(1, (-1, size))
        of_centres = self.centre_kv(centres.to(tokens.dtype)).transpose(0, 2)

        def attend(own: Tensor, following: Tensor) -> Tensor:
            """`[B, groups, size, C]` of pixels `[B, groups, size]` and those of the groups behind them."""
            groups = own.shape[1]
            pixels = torch.cat((own, following[:, -1:]), 1).flatten(1)[..., None].expand(-1, -1, dim)
            q, k, v = self.qkv(tokens.gather(1, pixels)).unflatten(1, (groups + 1, size)).unbind(3)
            k, v = (torch.cat((t[:, :-1], t[:, 1:]), 2) for t in (k, v))
            q, k, v = (t.flatten(0, 1).transpose(1, 2) for t in (q[:, :-1], k, v))
            k_centres, v_centres = of_centres.expand(batch * groups, -1, -1, -1, -1).unbind(2)
            out = F.scaled_dot_product_attention(q, k, v, scale=self.qkv.scale)
            out = out + F.scaled_dot_product_attention(q, k_centres, v_centres, scale=self.qkv.scale)
            return self.qkv.join(out.transpose(1, 2)).unflatten(0, (batch, groups))

        out = pixelwise(attend, sequence[:, :-1], sequence[:, 1:]).flatten(1, 2)[:, :count]
        return out.scatter(1, order[..., None].expand(-1, -1, dim), out)


class Block(nn.Module):
    """Attention by content, attention in patches, a convolution, one skip; `[B, H, W, C]`.

    Holds the centres of the attention by content. In training they follow the centres of the batches; with
    several processes, buffers must be kept equal, as `DistributedDataParallel` does by default. Before any
    training they are random: the official code would take means of consecutive pixels over the whole batch,
    so that samples would depend on each other, and on rounding, where mirrored pixels make equal centres.

    Args:
        aggregation: attention by content.
        local: attention in patches.
        dim: channels.
    """

    decay = 0.999

    def __init__(
        self,
        aggregation: TokenAggregation,
        local: LocalAttention,
        dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.aggregation = aggregation
        self.local = local
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, **dd)
        self.grad_checkpointing = False
        self.centres: Tensor
        self.initialised: Tensor
        self.register_buffer("centres", torch.randn(aggregation.num_centres, dim, **dd))
        self.register_buffer("initialised", torch.tensor(False, device=device))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self._forward(x, self.centres, self.initialised)[0]
        # Checkpointing repeats the pass in the backward one, which must begin with the same centres: they are
        # copied before and moved outside.
        centres, initialised = self.centres.clone(), self.initialised.clone()
        run = partial(checkpoint, self._forward) if self.grad_checkpointing else self._forward
        x, moved = run(x, centres, initialised)
        with torch.no_grad():
            following = self.decay * centres + (1 - self.decay) * moved
            self.centres.copy_(torch.where(initialised, following, moved))
            self.initialised.fill_(True)
        return x

    def _forward(self, x: Tensor, centres: Tensor, initialised: Tensor) -> tuple[Tensor, Tensor]:
        y, centres = self.aggregation(x, centres, initialised)
        y = self.local(y)
        return add_convolved(x, self.conv, y), centres


class CATANet(Restorer):
    """CATANet for super-resolution; images `[B, in_chans, H, W]` in [0, 1] to `[B, in_chans, s * H, s * W]`.

    Sides below the largest patch, on which the official code fails or is silently wrong, are reflect-padded
    on the right and bottom, and the output is cropped. Pixels are grouped over the whole image: tiles give
    other numbers.

    Args:
        in_chans: image channels.
        upscale: 2, 3, 4 or 8, or 1 for restoration at the input's size.
        embed_dim: channels of the body.
        num_heads: attention heads.
        qk_dim: channels of queries and keys.
        mlp_dim: hidden width of the MLPs.
        patch_sizes: side of the patches in pixels, per block.
        num_centres: centres per block.
        group_sizes: pixels that attend to each other by content, per block.
        iterations: in training, how often centres move per step.

    Raises:
        ValueError: an `upscale` without an upsampler, or patch sizes, centres and group sizes for different
            numbers of blocks.
    """

    def __init__(
        self,
        in_chans: int = 3,
        upscale: int = 4,
        embed_dim: int = 40,
        num_heads: int = 4,
        qk_dim: int = 36,
        mlp_dim: int = 96,
        patch_sizes: Sequence[int] = (16, 20, 24, 28, 16, 20, 24, 28),
        num_centres: Sequence[int] = (16, 32, 64, 128, 16, 32, 64, 128),
        group_sizes: Sequence[int] = (256, 128, 64, 32, 256, 128, 64, 32),
        iterations: int = 5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if not len(patch_sizes) == len(num_centres) == len(group_sizes):
            raise ValueError(
                "patch_sizes, num_centres and group_sizes must have an entry per block, "
                f"got {len(patch_sizes)}, {len(num_centres)} and {len(group_sizes)} entries"
            )
        padded_size = max(patch_sizes)
        info = RestorationInfo(
            task="super-resolution",
            upscale=upscale,
            channels=in_chans,
            min_size=padded_size // 2 + 1,
            exact_tiling=False,
            half_safe=False,
        )
        super().__init__(info, embed_dim)
        self.padded_size = padded_size
        blocks = []
        for patch, centres, group in zip(patch_sizes, num_centres, group_sizes):
            aggregation = TokenAggregation(
                embed_dim, qk_dim, num_heads, mlp_dim, centres, group, iterations, **dd
            )
            local = LocalAttention(embed_dim, qk_dim, num_heads, mlp_dim, patch, **dd)
            blocks.append(Block(aggregation, local, embed_dim, **dd))
        self.conv_first = nn.Conv2d(in_chans, embed_dim, 3, padding=1, **dd)
        self.blocks = nn.Sequential(*blocks)
        self.upsample = upsampler(embed_dim, upscale, dd, 0.1) if upscale != 1 else nn.Identity()
        self.conv_last = nn.Conv2d(embed_dim, in_chans, 3, padding=1, **dd)
        self.apply(init_linear)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters into layers for layer-wise decay."""
        return {
            "stem": r"^conv_first",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^(?:upsample|conv_last)", (99999,))],
        }

    def forward_features(self, x: Tensor) -> Tensor:
        """The body: images `[B, in_chans, H, W]`, sides of at least the largest patch, to `[B, C, H, W]`."""
        return run_body(x, self.conv_first, self.blocks, nn.Identity(), nn.Identity())

    def padded(self, x: Tensor) -> Tensor:
        """Images, reflected on the right and bottom up to the largest patch.

        Raises:
            ValueError: an image too small to be reflected; the message says the smallest size.
        """
        check_size(x, self.info.min_size)
        bottom, right = (max(self.padded_size - side, 0) for side in x.shape[-2:])
        return F.pad(x, (0, right, 0, bottom), mode="reflect") if bottom or right else x

    def restore(self, x: Tensor) -> Tensor:
        """Filled-up images `[B, in_chans, H, W]` to `[B, in_chans, upscale * H, upscale * W]`."""
        upscale = self.info.upscale
        y = self.forward_features(x)
        size = [side * upscale for side in x.shape[2:]]
        base = F.interpolate(x, size, mode="bilinear") if upscale > 1 else x.clone()

        def tail(y: Tensor, base: Tensor) -> Tensor:
            return self.conv_last(self.upsample(y)) + base.flatten(2, 3)

        lines = base.unflatten(2, (-1, upscale))  # all rows that one row of features becomes
        return convolved(tail, y, lines, halo=3, scale=upscale, dim=2, into=base)


def _unit(x: Tensor) -> Tensor:
    return F.normalize(at_least_float32(x), dim=-1)


def _nearest(tokens: Tensor, centres: Tensor) -> Tensor:
    """The centre `[B, N]` of largest cosine; both of unit length."""
    return (tokens @ centres.T).argmax(-1)


def _move(tokens: Tensor, centres: Tensor) -> Tensor:
    """The directions of the mean tokens nearest to each centre; a centre without tokens keeps its own."""
    centres = _unit(centres)
    members = _nearest(tokens, centres)[..., None] == torch.arange(len(centres), device=tokens.device)
    moved = _unit(torch.einsum("bnm,bnc->mc", members.to(tokens.dtype), tokens))
    return torch.where(members.any(1).any(0)[:, None], moved, centres)


_RULES = (
    ("^first_conv.", "^conv_first."),
    ("^last_conv.", "^conv_last."),
    ("^mid_convs.#.", "^blocks.#.conv."),
    ("^blocks.#.0.means$", "^blocks.#.centres$"),
    ("^blocks.#.0.initted$", "^blocks.#.initialised$"),
    ("^blocks.#.0.", "^blocks.#.aggregation."),
    ("^blocks.#.1.layer.0.", "^blocks.#.local."),
    ("^blocks.#.1.layer.1.", "^blocks.#.local.mlp."),
    (".aggregation.irca_attn.to_", ".aggregation.centre_kv."),
    (".aggregation.iasa_attn.to_", ".aggregation.qkv."),
    (".aggregation.iasa_attn.proj.", ".aggregation.proj."),
    (".aggregation.conv1x1.", ".aggregation.out."),
    (".local.fn.to_", ".local.qkv."),
    (".local.fn.proj.", ".local.proj."),
    (".mlp.fn.fc#.", ".mlp.fc#."),
    (".mlp.fn.dwconv.depthwise_conv.0.", ".mlp.dwconv."),
)
# The authors' upsampler has one step, or two.
_ONE_STEP = Names(*_RULES, ("^upconv.", "^upsample.0."))
_TWO_STEPS = Names(*_RULES, ("^upconv1.", "^upsample.0."), ("^upconv2.", "^upsample.3."))


def _convert(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The 1x1 convolutions become linear layers.

    Centres without the note that they are initialised are taken as such: no training saves them otherwise.
    """
    out = {n: v.flatten(1) if n.endswith(".out.weight") and v.ndim == 4 else v for n, v in weights.items()}
    for name in [name for name in out if name.endswith(".centres")]:
        out.setdefault(name.replace(".centres", ".initialised"), torch.tensor(True))
    return out


def _to_official(weights: Weights, model: CATANet) -> dict[str, Tensor]:
    """Our weights in the authors' names."""
    names = _TWO_STEPS if "upsample.3.weight" in weights else _ONE_STEP
    return {
        names.to_official(name): value[..., None, None] if name.endswith(".out.weight") else value
        for name, value in weights.items()
    }


def _arguments(ours: Shapes, official: Shapes) -> dict[str, Any]:
    dim, in_chans = ours["conv_first.weight"][:2]
    count = ours.length("blocks")
    out: dict[str, Any] = {
        "in_chans": in_chans,
        "upscale": upscale_of(ours),
        "embed_dim": dim,
        "qk_dim": ours["blocks.0.aggregation.qkv.q.weight"][0],
        "mlp_dim": ours["blocks.0.aggregation.mlp.fc1.weight"][0],
        "num_centres": tuple(ours[f"blocks.{i}.centres"][0] for i in range(count)),
    }
    if count != 8:
        # The published sizes, which repeat every four blocks.
        out["patch_sizes"] = Guess(tuple(islice(cycle((16, 20, 24, 28)), count)))
        out["group_sizes"] = Guess(tuple(islice(cycle((256, 128, 64, 32)), count)))
    return out


LAYOUT = Layout(
    family="catanet",
    model_cls=CATANet,
    marks=(r"\.aggregation\.centre_kv\.", r"\.centres$"),
    rename=(_ONE_STEP + _TWO_STEPS).to_ours,
    convert=_convert,
    reads={
        "conv_first.weight": 4,
        "blocks.0.aggregation.qkv.q.weight": 2,
        "blocks.0.aggregation.mlp.fc1.weight": 2,
        "blocks.#.centres": 2,
    },
    arguments=_arguments,
    to_official=_to_official,
    wrapper="params",
    unlearned=("num_heads", "patch_sizes", "group_sizes"),
)


def _cfg(upscale: int, results: str) -> dict[str, Any]:
    return super_resolution_cfg(
        results,
        url=f"https://github.com/EquationWalker/CATANet/releases/download/v0.0/x{upscale}.pth",
        min_size=15,
        paper_ids="arXiv:2503.06896",
        paper_name="CATANet: Efficient Content-Aware Token Aggregation for Lightweight Image "
        "Super-Resolution",
        origin_url="https://github.com/EquationWalker/CATANet",
    )


default_cfgs = generate_default_cfgs(
    {
        "catanet_x2.div2k": _cfg(2, "38.28/.9617 33.99/.9217 32.37/.9023 33.09/.9372 39.37/.9784"),
        "catanet_x3.div2k": _cfg(3, "34.75/.9300 30.67/.8481 29.28/.8101 29.04/.8689 34.40/.9499"),
        "catanet_x4.div2k": _cfg(4, "32.58/.8998 28.90/.7880 27.75/.7427 26.87/.8081 31.31/.9183"),
    }
)

VARIANTS = {
    "catanet_x2": Variant("CATANet x2: 0.48 M parameters.", upscale=2),
    "catanet_x3": Variant("CATANet x3: 0.55 M parameters.", upscale=3),
    "catanet_x4": Variant("CATANet x4: 0.54 M parameters.", upscale=4),
}
# The files are called "x2.pth" and so on.
register(__name__, LAYOUT, VARIANTS, builder=build_restoration, name_downloads=True)
