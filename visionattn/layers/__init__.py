"""Attention layers and parts that several families share or users plug into networks of their own."""

from .bilevel_routing import BiLevelRoutingAttention
from .nhwc import conv_nhwc, fill_up

__all__ = ["BiLevelRoutingAttention", "conv_nhwc", "fill_up"]
