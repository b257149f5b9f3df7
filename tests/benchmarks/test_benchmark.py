"""The comparison with the authors' formulation: equal numbers, everything put back, results to keep."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from benchmarks import kernels, memory, models, report, scaling
from benchmarks.cases import CASES, Case
from benchmarks.formulations import FORMULATIONS, Formulation
from benchmarks.measure import Timing, peak_memory, time_in_turn
from visionattn.errors import InputError
from visionattn.models.registry.zoo import model_names

CPU = torch.device("cpu")
RESULTS = Path(__file__).parents[2] / "benchmarks"
SMALL: dict[str, tuple[str, dict[str, Any], tuple[int, int]]] = {
    "agent_attention": (
        "agent_pvt_tiny",
        {"img_size": (64, 96), "depths": (1, 1, 1, 1), "embed_dims": (32,) * 4, "num_heads": (2,) * 4},
        (64, 96),
    ),
    "biformer": (
        "biformer_tiny",
        {"depths": (1, 1, 1, 1), "embed_dims": (32, 64, 64, 64), "n_win": 2, "topks": (1, 2, 3, -2)},
        (64, 96),
    ),
    "care": (
        "care_s0",
        {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 64, 64), "head_dims": (0, 0, 8, 16)},
        (64, 96),
    ),
    "catanet": (
        "catanet_x2",
        {"patch_sizes": (8, 12), "num_centres": (5, 9), "group_sizes": (32, 20)},
        (20, 31),
    ),
    "cfsr": ("cfsr_x2", {"depths": (2, 1), "embed_dim": 8}, (20, 32)),
    # A width at which the position bias depends on the offset.
    "craft": ("craft_x2", {"depths": (1, 1), "embed_dim": 96}, (20, 32)),
    "fcaformer": (
        "fcaformer_l1",
        {"img_size": (64, 96), "embed_dims": (16, 24, 32, 64), "depths": (1, 1, 3, 2)},
        (64, 96),
    ),
    "efficientmod": (
        "efficientmod_s",
        {"depths": (2, 1, 2, 1), "attention_depths": (0, 0, 1, 1), "embed_dims": (16, 24, 32, 40)},
        (64, 96),
    ),
    "halonet": (
        "halonet_h0",
        {
            "depths": (1, 2, 1, 1),
            "embed_dim": 16,
            "num_heads": (2, 2, 4, 4),
            "value_ratio": 1.5,
            "out_ratio": 1.25,
            "final_dim": 24,
        },
        (96, 64),
    ),
    "hat": (
        "hat_x2",
        {"depths": (2,), "embed_dim": 12, "num_heads": 2, "window_size": 8, "squeeze_factor": 2},
        (20, 32),
    ),
    "hsdt": ("hsdt_m", {"in_chans": 3, "embed_dim": 4, "depth": 3, "downsample": (1,)}, (20, 32)),
    "inline_attention": (
        "inline_cswin_tiny",
        {"depths": (1, 1, 1, 1), "embed_dim": 32, "num_heads": (1, 2, 2, 2), "stripe": 2},
        (64, 96),
    ),
    "l2vit": (
        "l2vit_t",
        {"depths": (2,) * 4, "embed_dims": (32,) * 4, "num_heads": (2,) * 4, "window_size": 3},
        (64, 96),
    ),
    "nat": (
        "dinat_mini",
        {
            "depths": (2, 2),
            "embed_dim": 16,
            "num_heads": (2, 2),
            "kernel_size": 3,
            "dilations": ((1, 4), (2, 1)),
        },
        (56, 40),
    ),
    "rgt": ("rgt_s_x2", {"depths": (3, 2), "embed_dim": 96}, (20, 40)),
    "swin_vsa": (
        "swin_vsa_t",
        {
            "depths": (1, 1, 1, 1),
            "global_blocks": (1, 1, 1, 1),
            "embed_dim": 16,
            "num_heads": (2, 2, 2, 2),
            "window_size": 2,
        },
        (64, 128),
    ),
    "vitae_vsa": (
        "vitaev2_vsa_s",
        {
            "depths": (1, 1, 1, 1),
            "embed_dims": (16, 16, 32, 64),
            "token_dims": (16, 32, 64, 128),
            "reduction_heads": (1, 2, 2, 4),
            "num_heads": (2, 2, 4, 4),
            "window_size": 2,
        },
        (64, 128),
    ),
    "overlock": (
        "overlock_xt",
        {
            "depths": (1, 1, 1, 1),
            "sub_depths": (2, 1),
            "embed_dims": (16, 16, 32, 32),
            "sub_num_heads": (2, 2),
            "projection": 40,
        },
        (224, 256),
    ),
    "pmnet": ("pmnet_small", {}, (20, 32)),
    "smt": (
        "smt_l",
        {"depths": (1, 1, 2, 1), "embed_dims": (16, 24, 32, 40), "num_heads": (0, 0, 2, 4)},
        (64, 96),
    ),
}


def build(family: str) -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    name, kwargs, size = SMALL[family]
    net = timm.create_model(name, dtype=torch.float64, **kwargs)
    with torch.no_grad():
        for parameter in net.parameters():  # biases and factors as large as what they meet
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return net.eval(), torch.rand(2, 3, *size, dtype=torch.float64)


@pytest.mark.parametrize("family", FORMULATIONS)
def test_the_authors_formulation_gives_the_same_outputs_and_gradients(family: str):
    net, image = build(family)

    def outcome() -> list[torch.Tensor]:
        net.zero_grad()
        out = net(image)
        out.square().mean().backward()
        return [out.detach(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)]

    ours = outcome()
    with FORMULATIONS[family].in_place_of_kernels(net):
        torch.testing.assert_close(outcome(), ours)


@pytest.mark.parametrize("family", FORMULATIONS)
def test_kernels_are_put_back(family: str):
    formulation = FORMULATIONS[family]
    net, image = build(family)
    other, _ = build(family)
    ours, theirs = [type(module) for module in net.modules()], formulation.classes_in(net)
    expected = other(image)
    with formulation.in_place_of_kernels(net):
        assert [type(module) for module in net.modules()] == [theirs.get(kind, kind) for kind in ours]
        assert [type(module) for module in other.modules()] == ours
        torch.testing.assert_close(other(image), expected)
    with pytest.raises(ZeroDivisionError), formulation.in_place_of_kernels(net):
        _ = 1 / 0
    assert [type(module) for module in net.modules()] == ours
    assert not net._forward_pre_hooks


@pytest.mark.parametrize("family", [f for f, formulation in FORMULATIONS.items() if not formulation.hosts])
def test_every_class_of_a_formulation_is_found(family: str):
    net, _ = build(family)
    classes = FORMULATIONS[family].classes
    assert set(classes) <= {type(module) for module in net.modules()}
    assert all(issubclass(theirs, ours) for ours, theirs in classes.items())


@pytest.mark.parametrize("family", FORMULATIONS)
@pytest.mark.parametrize("train", [False, True])
def test_comparison(family: str, train: bool):
    net, image = build(family)
    row = models.compare(net.train(train), "name", FORMULATIONS[family], image, repeats=2)
    assert row.mode == ("training" if train else "inference")
    assert row.difference < 1e-12
    assert row.ratio == row.authors.median / row.ours.median
    assert row.ours.spread >= 0
    assert row.our_memory is not None
    assert row.authors_memory is not None
    assert row.our_memory > 0
    if family in ("biformer", "hat"):  # on small maps the others hold nothing large in either form
        assert row.our_memory < row.authors_memory


def test_equal_passes_hold_equal_memory():
    net, image = build("l2vit")
    row = models.compare(net.train(), "name", Formulation({}, (), ""), image, repeats=1)
    assert row.our_memory == row.authors_memory


def test_every_variant_of_a_family_has_its_formulation_and_other_families_are_refused():
    found = set()
    for name in model_names():
        family = timm.model_entrypoint(name).__module__.rsplit(".", 1)[-1]
        if family in FORMULATIONS:
            assert models.formulation_of(name) is FORMULATIONS[family]
            found.add(family)
        else:
            with pytest.raises(
                InputError, match=f"{name} is not at hand, only that of agent_attention, biformer"
            ):
                models.formulation_of(name)
    assert found == set(FORMULATIONS)


def test_names_are_checked_before_work_starts():
    with pytest.raises(InputError, match="unknown network 'hat_s_x5': did you mean hat_s_x"):
        next(models.compare_models(["biformer_tiny", "hat_s_x5"]))
    with pytest.raises(InputError, match=r"cannot run hat_s_x4 at 3x64: .* at least 9 pixels"):
        next(models.compare_models(["hat_s_x4"], size=(3, 64)))


def test_peak_memory_counts_what_is_held_at_one_time():
    def call() -> torch.Tensor:
        first = torch.empty(1000, 1000)
        second = torch.empty(1000, 1000)
        del first
        third = torch.empty(500, 1000)
        return third + second.sum()

    assert peak_memory(call, CPU) == pytest.approx(8e6, rel=0.01)


@pytest.mark.parametrize(
    "case",
    [
        Case("windows", "window", 8, 2, 4, {"window_size": 4}, True),
        Case("shifted", "window", 8, 2, 4, {"window_size": 4, "shift": 2}, True),
        Case("neighborhoods", "neighborhood", 9, 2, 4, {"kernel_size": 4, "stride": 2}, True),
        Case("plain", "neighborhood", 9, 1, 4, {"kernel_size": 3}),
        Case("overlap", "overlap", 8, 2, 4, {"window_size": 4, "overlap": 1}, True),
        Case("routed", "routed", 8, 2, 4, {"regions": 4, "topk": 3}),
    ],
    ids=lambda case: case.name,
)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_kernels_and_their_peers_compute_the_same(case: Case, monkeypatch: pytest.MonkeyPatch):
    # Compilation takes half a minute and changes no number.
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setitem(CASES, case.name, case)
    rows = list(kernels.compare_kernels([case.name], batch=2, repeats=1))
    ran = {(row.implementation, row.mode): row for row in rows if row.time is not None}
    for mode in ("forward", "forward+backward"):
        assert ran["ours: torch", mode].ratio == 1
        assert ran["ours: reference", mode].error == 0
    assert len(ran) >= 6
    for (name, _), row in ran.items():
        assert row.error is not None
        assert row.error < 1e-5 or name == "dense SDPA, all pairs"
    for row in rows:
        assert bool(row.reason) == (row.time is None)
    reasons = {row.implementation: row.reason for row in rows if row.reason}
    assert "triton" in reasons["ours: triton"]
    if case.kind == "neighborhood":
        assert reasons["NATTEN"] == "RuntimeError: NATTEN is not installed"
    page = kernels.page(rows)
    assert all(len(row.cells()) == len(page.columns) for row in rows)


def test_large_shapes_are_left_out_on_a_cpu(monkeypatch: pytest.MonkeyPatch):
    large = {name: case for name, case in CASES.items() if case.is_large}
    assert set(large) == {"na80_stride1", "na80_stride16"}
    monkeypatch.setattr(kernels, "CASES", large)
    assert [row.reason.split(":")[0] for row in kernels.compare_kernels()] == ["left out"] * 2


def test_the_simulator_prints_the_known_tilings(run_tool):
    status, printed, _ = run_tool("benchmark.py", "simulate")
    assert status == 0
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()]
    costs = {tuple(line[:5]): line[-2:] for line in lines}
    assert costs["56x56", "kernel 7, stride 1", "8x8", "8x8", "floating"][0] == "5.2"
    assert costs["56x56", "kernel 7, stride 1", "8x8", "8x8", "aligned"][0] == "9.6"
    assert costs["256x256", "kernel 80, stride 16", "16x8", "16x8", "aligned"] == ["1.0", "10.24x"]
    options = ["--window", "7", "--shift", "3", "--size", "56", "56", "--query-tile", "7", "7"]
    status, printed, _ = run_tool("benchmark.py", "simulate", *options, "--key-tile", "7", "7")
    assert status == 0
    assert "windows of 7, shift 3" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kernel", "60"], "needs sides of at least 60, but --size is 56 56"),
        (["--kernel", "3", "--stride", "4"], "--stride must be at most --kernel 3, but is 4"),
        (["--kernel", "3", "--window", "4"], "give --kernel or --window"),
        (["--stride", "4"], "give --kernel or --window"),
        (["--window", "4", "--stride", "2"], "--stride goes with --kernel only"),
        (["--kernel", "3", "--shift", "2"], "--shift goes with --window only"),
        (["--window", "4", "--shift", "4"], "--shift must lie in 0..3, but is 4"),
    ],
)
def test_bad_options_of_the_simulator(run_tool, options: list[str], message: str):
    status, printed, error = run_tool("benchmark.py", "simulate", *options)
    assert (status, printed) == (2, "")
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_committed_pages_show_the_committed_results(path: Path):
    kinds: dict[str, tuple[Any, Any]] = {
        "kernels": (kernels, kernels.Measurement),
        "scaling": (scaling, scaling.Growth),
        "memory": (memory, memory.LargePicture),
        "models": (models, models.Comparison),
    }
    module, kind = next(found for name, found in kinds.items() if name in path.stem.split("_"))
    content = json.loads(path.read_text())
    rows: list[Any] = []
    for line in content["results"]:
        timings = {name: Timing(**value) for name, value in line.items() if isinstance(value, dict)}
        series = [Timing(**value) for value in line.get("timings", [])]
        rows.append(kind(**{**line, **timings, **({"timings": series} if series else {})}))
    page, text = module.page(rows), path.with_suffix(".md").read_text()
    assert report.table(page.columns, [row.cells() for row in rows]) in text
    assert report.notes(page) in text
    assert f"`{content['command']}`" in text


def _work(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_calls_take_turns():
    order = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b"), "long": lambda: _work(0.06)}
    timings = time_in_turn(calls, dict.fromkeys(calls, nullcontext), CPU, repeats=3)
    assert [name for name, _ in groupby(order)] == ["b", "a", "b", "a", "b"]
    # Once, and three times a call that does not count before ten that do.
    assert order.count("a") == order.count("b") == 1 + 3 * 11
    assert set(timings) == {"a", "b", "long"}
    assert timings["long"].median >= 0.06 > timings["a"].median


def test_command_line(run_tool, tmp_path: Path):
    output = tmp_path / "results" / "table.json"
    arguments = ["biformer_tiny", "--size", "56", "40", "--repeats", "1", "--output", str(output)]
    status, printed, _ = run_tool("benchmark.py", "models", *arguments)
    assert status == 0
    assert printed.startswith("| network")
    content = json.loads(output.read_text())
    (row,) = content["results"]
    assert row["input"] == [1, 3, 56, 40]
    assert row["difference"] < 1e-5
    assert {"command", "machine", "date", "versions", "clock", "threads"} <= set(content)
    page = output.with_suffix(".md").read_text()
    assert printed.split("\n\n")[0] in page
    assert content["machine"] in page

    status, _, error = run_tool("benchmark.py", "models", "biformer_tinny")
    assert status == 2
    assert error.startswith("error: unknown network 'biformer_tinny': did you mean biformer_tiny, ")
    assert len(error.splitlines()) == 1
    status, _, error = run_tool("benchmark.py", "kernels", "window9")
    assert status == 2
    assert error.startswith("error: unknown shape 'window9': did you mean window8, ")
    assert run_tool("benchmark.py", "models", "biformer_tiny", "--repeats", "0")[0] == 2
    assert run_tool("benchmark.py", "models", "biformer_tiny", "--device", "abacus")[0] == 2
    status, printed, _ = run_tool("benchmark.py", "--help")
    assert status == 0
    assert "examples:" in printed
