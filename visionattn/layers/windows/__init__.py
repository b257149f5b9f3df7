"""Attention in windows that are more than a grid."""
