"""Every published selector, pattern and partition against the outputs of its authors' code or formula."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import parity
import pytest
import torch
from torch import Tensor

from visionattn import kernels
from visionattn.kernels import Blocks, block_attention, routed_attention
from visionattn.kernels.routed.lists import listed_regions
from visionattn.kernels.routed.reference import places
from visionattn.kernels.routed.selectors import chunks, mass, quantized

FOLDER = Path(parity.__file__).parent / "functions" / "selectors"
FIXTURES = sorted(path.stem for path in FOLDER.glob("*.safetensors"))
# What a fixture says of a whole layer, and not of its selection.
OF_LAYERS = ("ratio", "feature_map", "linear")

Data = dict[str, Tensor]


def close(ours: Tensor, stored: Tensor) -> None:
    error = (ours.double() - stored.double()).norm() / stored.double().norm()
    assert ours.shape == stored.shape
    assert error < 1e-5, f"relative error {error:.1e}"


def same_sets(lists: Tensor, stored: Tensor) -> None:
    assert lists.dtype == torch.int32
    named = listed_regions(lists, stored.shape[-1])
    assert torch.equal(named, stored.bool())
    assert torch.equal(named.sum(-1), (lists >= 0).sum(-1)), "a list names a region twice"


def size(data: Data) -> tuple[int, int]:
    return data["q"].shape[1], data["q"].shape[2]


def attention(data: Data, lists: Tensor, options: dict[str, Any], rows: Any = None) -> None:
    out = routed_attention(
        data["q"], data["k"], data["v"], lists, options["region_size"], query_region_size=rows
    )
    close(out, data["out" if "out" in data else "sparse"])


def check_selector(function: str, options: dict[str, Any], data: Data) -> None:
    lists = getattr(kernels, function)(data["q"], data["k"], **options)
    same_sets(lists, data["listed"])
    attention(data, lists, options, 1 if function == "gated_regions" else options.get("query_region_size"))
    if "mass" in data:
        shares = mass.mass_scores(data["q"], data["k"], options["region_size"])
        close(shares, data["mass"])
        if not options["adapt_heads"]:
            recall = shares.gather(3, lists.long()).sum((2, 3)) / shares.sum((2, 3))
            close(recall, data["recall"])
    if "score" in data:
        given = (options[name] for name in ("region_size", "local", "sinks", "bits"))
        close(quantized.quantized_scores(data["q"], data["k"], *given), data["score"])


def check_pattern(function: str, options: dict[str, Any], data: Data) -> None:
    same_sets(getattr(kernels, function)(**options), data["listed"])


def check_chunks(function: str, options: dict[str, Any], data: Data) -> None:
    starts = torch.tensor(options.pop("key_boundaries"), dtype=torch.int32)
    height, width = size(data)
    own = kernels.region_blocks(height, width, options.pop("region_size"))
    others = Blocks(torch.arange(height * width, dtype=torch.int32)[None, None], starts[None, None])
    scores = chunks.block_scores(data["q"], data["k"], own, others, options["normalise"])
    close(scores[:, 0], data["scores"])
    lists = kernels.topk_blocks(data["q"], data["k"], own, others, **options)
    same_sets(lists, data["listed"])
    close(block_attention(data["q"], data["k"], data["v"], lists, own, others), data["out"])


def check_keys(function: str, options: dict[str, Any], data: Data) -> None:
    values = data["v"].flatten(3) @ data["weight"].T
    bias = (data["decay"] * torch.nn.functional.softplus(values)).permute(0, 3, 1, 2)
    close(bias, data["key_bias"])
    lists = kernels.dynamic_mask_keys(bias, **options)
    region = options["region_size"] or (1, 1)
    region_of, _ = places(size(data), region)
    named = listed_regions(lists, int(region_of.max()) + 1)[:, :, 0, region_of]
    assert torch.equal(named.unflatten(2, size(data)), data["listed"].bool())
    # The bias as one more channel, as the documentation says.
    q, k, v = (data[name] for name in "qkv")
    scale = q.shape[-1] ** -0.5
    q = torch.cat((q, torch.full_like(q[..., :1], 1 / scale)), -1)
    k = torch.cat((k, bias.permute(0, 2, 3, 1)[..., None]), -1)
    v = torch.cat((v, torch.zeros_like(v[..., :1])), -1)
    out = routed_attention(q, k, v, lists, region, query_region_size=size(data), scale=scale)
    close(out[..., :-1], data["out"])


def check_clusters(function: str, options: dict[str, Any], data: Data) -> None:
    found = []
    for name, side in (("q", "query"), ("k", "key")):
        count, init = options[f"{side}_clusters"], data[f"{side}_init"]
        clusters = kernels.kmeans_blocks(data[name], count, options["iterations"], init)
        assert torch.equal(clusters.labels[0], data[f"{side}_labels"])
        close(clusters.centroids[0], data[f"{side}_centroids"])
        assert torch.equal(
            clusters.counts[0], torch.stack([x.bincount(minlength=count) for x in clusters.labels[0]])
        )
        found.append(clusters)
    own, others = found
    shares = {name: options[name] for name in ("top_p", "min_share")}
    lists = kernels.topp_blocks(own.centroids, others.centroids, others.counts, **shares)
    same_sets(lists, data["listed"])
    blocks = [kernels.sort_blocks(x.labels, x.counts.shape[2]) for x in found]
    close(block_attention(data["q"], data["k"], data["v"], lists, *blocks), data["out"])


def check_buckets(function: str, options: dict[str, Any], data: Data) -> None:
    directions = data["directions"]
    for name, side in (("q", "query"), ("k", "key")):
        assert torch.equal(kernels.lsh_codes(data[name], directions), data[f"{side}_hash"])
    inputs = (data["q"], data["k"], data["v"], directions)
    for mask_own, expected in ((False, "out"), (True, "out_masked")):
        if expected in data:
            samples = data.get("samples", 0)
            out = kernels.lsh_attention(*inputs, block=options["block"], samples=samples, mask_own=mask_own)
            close(out, data[expected])


def check_routing(function: str, options: dict[str, Any], data: Data) -> None:
    counts = options["queries"], options["keys"]
    inputs = (data["q"], data["k"], data["v"], data["centroids"])
    close(kernels.cluster_attention(*inputs, *counts), data["out"])


CHECKS: dict[str, Callable[[str, dict[str, Any], Data], None]] = {
    "cluster_attention": check_routing,
    "dynamic_mask_keys": check_keys,
    "gated_regions": check_selector,
    "hierarchical_regions": check_selector,
    "kmeans_blocks, topp_blocks": check_clusters,
    "lsh_codes, block_attention": check_buckets,
    "mass_regions": check_selector,
    "power_regions": check_pattern,
    "quantized_regions": check_selector,
    "radial_regions": check_pattern,
    "strided_regions": check_pattern,
    "topk_blocks": check_chunks,
    "topk_regions": check_selector,
}


def test_all_fixtures_are_there() -> None:
    assert len(FIXTURES) == 27


@pytest.mark.parametrize("name", FIXTURES)
def test_fixture(name: str) -> None:
    meta, data = parity.load(FOLDER / f"{name}.safetensors")
    options = {
        key: tuple(value) if key.endswith("region_size") and value is not None else value
        for key, value in meta["build"].items()
        if key not in OF_LAYERS
    }
    function = options.pop("function")
    CHECKS[function](function, options, data)
    if "layers_to_reach_all" in meta:
        lists = getattr(kernels, function)(**options)
        assert kernels.layers_to_reach(lists) == meta["layers_to_reach_all"]
