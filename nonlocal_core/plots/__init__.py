"""Pictures of what positions attend to; needs the extra "plots", which is imported when something is drawn."""

from nonlocal_core.plots.arrow import arrows
from nonlocal_core.plots.heatmap import heatmaps

__all__ = ["arrows", "heatmaps"]
