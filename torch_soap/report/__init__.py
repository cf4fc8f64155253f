"""The HTML report of a plan: one file that needs no network."""

from torch_soap.report.page import write_report

__all__ = ["write_report"]
