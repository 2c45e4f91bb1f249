"""A run's model in the forms that others load, each loaded again and compared before it is published."""

from empg_lite.tools.export.models import export_adapter, export_gguf, export_merged, upload_adapter
from empg_lite.tools.export.sft import export_sft

__all__ = ["export_adapter", "export_gguf", "export_merged", "export_sft", "upload_adapter"]
