"""The public data sets, and the ways to divide a set over simulated sites, by name. Standard library alone."""

from typing import Literal

PublicName = Literal["voc2007", "coco2014", "coco2017", "nuswide", "objects365", "multiscene", "mlrsnet"]
"""The public data sets; `data.public.registry` has the rest."""

LayoutName = Literal["folders", "yolo", "table"]
"""How a lab keeps pictures of its own; `data.layouts` has the rest."""

Division = Literal["labels", "features", "dirichlet", "uniform"]
"""By clusters of label sets or of pictures, by draws for each label, or all alike; `data.partition` has the rest."""
