"""A report of runs: one self-contained HTML page, and its figures as files."""

from empg_lite.tools.report.build import write_report

__all__ = ["write_report"]
