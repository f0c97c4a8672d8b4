"""The report of folders, and its figures: `write_report`, `claim_report`, `figures`, `image_maps`, `ranking`.

No model and no network is needed; neither torch nor transformers is imported.
"""

from vlmscope.report.page import claim_report, write_report

__all__ = ["claim_report", "write_report"]
