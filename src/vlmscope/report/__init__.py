"""The report of run folders, and its figures: `write_report`, `figures`, `image_maps`, `ranking`.

No model and no network is needed; neither torch nor transformers is imported.
"""

from vlmscope.report.page import write_report

__all__ = ["write_report"]
