"""A run as one page that needs nothing but a browser, and its figures as files."""

from empg_lite.tools.report.build import write_report

__all__ = ["write_report"]
