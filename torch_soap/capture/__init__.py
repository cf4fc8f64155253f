"""Capture: an nn.Module becomes a graph of functional operators over tensors of known global shape."""

from torch_soap.capture.capture import Captured
from torch_soap.capture.graph import Graph, Node, Ref, Value
from torch_soap.capture.importer import CaptureError
from torch_soap.capture.interpret import run_graph
from torch_soap.capture.ladder import capture

__all__ = ["CaptureError", "Captured", "Graph", "Node", "Ref", "Value", "capture", "run_graph"]
