"""The scores of an own and a streamed tile inside the fused kernels: product, bias and mask."""

# Inside kernels, constants and shapes follow Triton's rules.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
from __future__ import annotations

import triton
import triton.language as tl

from visionattn.kernels.local.fused.geometry import block_begin, key_window_begin
from visionattn.kernels.triton_rows import LOG2_E


@triton.jit
def part_of_keys(keys, g):
    """Compute what a key adds to the place of a pair in a bias, whose keys lie in rows."""
    return keys.y * g.bias_columns + keys.x


@triton.jit
def origin_of(queries, at, g):
    """Compute the place of the first key of a query's window, counted as `part_of_keys` counts."""
    begin_y = key_window_begin(queries.y, at.y.length, g.y)
    return begin_y * g.x.key_window + key_window_begin(queries.x, at.x.length, g.x)


@triton.jit
def part_of_queries(queries, at, g, FORM: tl.constexpr):
    """Compute what a query adds to the place of a pair in a bias."""
    if FORM.dense:
        row = (queries.y - block_begin(queries.y, g.y)) * g.x.window + queries.x - block_begin(queries.x, g.x)
        part = row * (g.y.key_window * g.x.key_window) - origin_of(queries, at, g)
    else:
        part = (g.y.reach - queries.y) * g.bias_columns + g.x.reach - queries.x
    return part


@triton.jit
def part_of_own(own, bias, at, g, FORM: tl.constexpr):
    """Compute what the pixels of an own tile add to the places of their pairs in a bias."""
    if bias is None:
        part = own.y
    elif FORM.of_keys:
        part = part_of_keys(own, g)
    else:
        part = part_of_queries(own, at, g, FORM)
    return part


@triton.jit
def places_of_pairs(own_part, others, at, g, FORM: tl.constexpr):
    """Compute the places of the pairs of two tiles in the bias of a head."""
    others_part = part_of_queries(others, at, g, FORM) if FORM.of_keys else part_of_keys(others, g)
    return own_part[:, None] + others_part[None, :]


@triton.jit
def biased(logits, bias, own_part, others, at, g, FORM: tl.constexpr):
    """Add the bias to logits of pairs that all see each other."""
    if bias is not None:
        entries = bias + at.head * g.bias_entries
        place = places_of_pairs(own_part, others, at, g, FORM)
        logits += tl.load(entries + place).to(tl.float32) * LOG2_E
    return logits


@triton.jit
def masked(logits, visible, bias, own_part, others, at, g, FORM: tl.constexpr):
    """Add the bias to logits, and make them -inf where not visible."""
    if bias is not None:
        # Pairs that are not visible read any entry: keeping the place inside the bias takes far fewer
        # registers than a mask in the layout of the load.
        entries = bias + at.head * g.bias_entries
        place = places_of_pairs(own_part, others, at, g, FORM)
        place = tl.minimum(tl.maximum(place, 0), g.bias_entries - 1)
        logits += tl.load(entries + place).to(tl.float32) * LOG2_E
    return tl.where(visible, logits, float("-inf"))


@triton.jit
def visible_pairs(own, others):
    """Tell which pairs of an own and a streamed pixel see each other."""
    y, x, rows, columns = others.y[None, :], others.x[None, :], own.rows, own.columns
    visible = (rows.low[:, None] <= y) & (y < rows.high[:, None])
    return visible & (columns.low[:, None] <= x) & (x < columns.high[:, None])


@triton.jit
def scores(own_rows, other_rows, own, others, bias, own_part, at, scale, g, FORM: tl.constexpr):
    """Compute base-2 logits `[own, others]` of queries and keys, -inf for pairs that do not see each other.

    Args:
        own_rows: vectors of the own tile.
        other_rows: vectors of the streamed tile.
        own: the own tile.
        others: the streamed tile.
        bias: that of all heads, or None.
        own_part: `part_of_own`.
        at: the place of the program.
        scale: multiplies q·k.
        g: the geometry.
        FORM: the constants.
    """
    logits = tl.dot(own_rows, tl.trans(other_rows), input_precision=FORM.precision) * (scale * LOG2_E)
    if FORM.mask == "none":
        logits = biased(logits, bias, own_part, others, at, g, FORM)
    elif FORM.mask == "rectangle":
        logits = masked(logits, others.seen[None, :], bias, own_part, others, at, g, FORM)
    elif FORM.mask == "pairs":
        logits = masked(logits, visible_pairs(own, others), bias, own_part, others, at, g, FORM)
    else:
        rows, columns = own.rows, own.columns
        whole = (others.first_y >= rows.inner_start) & (others.first_x >= columns.inner_start)
        whole &= others.first_y + FORM.others // FORM.strip <= rows.inner_stop
        whole &= others.first_x + FORM.strip <= columns.inner_stop
        if whole:
            logits = biased(logits, bias, own_part, others, at, g, FORM)
        else:
            logits = masked(logits, visible_pairs(own, others), bias, own_part, others, at, g, FORM)
    return logits
