"""Rewrite: compute items of a rank's program become fx submodules that work on tiles."""

from torch_soap.rewrite.segment import build_segment

__all__ = ["build_segment"]
