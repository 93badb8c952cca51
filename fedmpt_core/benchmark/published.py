"""Figures that FedMPT's authors reported, to stand beside ours where data and frozen weights are the paper's.

Table 1 of the paper: means over heterogeneity t = 10 to 100 %. They are the authors' own, of their own runs; what else
differed from ours (rounds, resolution, number of seeds) is only partly known. On other data or weights nothing is
shown: figures of different things do not belong in one table.
"""

import json
from pathlib import Path

from fedmpt_core.common.files import file_digest
from fedmpt_core.config.job import JobConfig
from fedmpt_core.config.site import DataConfig, SiteConfig
from fedmpt_core.data.public.prepare import record_path

_TABLE_1 = {
    "voc2007": {"dualcoop": 84.94, "fedtpg": 85.12, "fedmvp": 85.59, "fedmpt": 89.51},
    "coco2014": {"dualcoop": 55.63, "fedtpg": 58.69, "fedmvp": 61.64, "fedmpt": 64.65},
    "nuswide": {"dualcoop": 45.00, "fedtpg": 50.93, "fedmvp": 52.30, "fedmpt": 56.69},
}
_ARCHITECTURES = ("ViT-B-16", "ViT-B-16-quickgelu")
NOTE = "Reported by the authors (Table 1, mean over t = 10 to 100 %): their runs, not ours; see the method page."


def reported_by_the_authors(job: JobConfig, sites: dict[str, SiteConfig]) -> dict[str, float] | None:
    """The authors' mAP in percent by method, for a job on the paper's data with the paper's weights, or None.

    Args:
        job: any job of the benchmark.
        sites: its sites.
    """
    backbone = job.backbone
    if backbone.architecture not in _ARCHITECTURES or backbone.weights != "openai":
        return None
    kinds = {_kind(data) for data in {site.data.path: site.data for site in sites.values()}.values()}
    return _TABLE_1.get(kinds.pop()) if len(kinds) == 1 else None


def _kind(data: DataConfig) -> str:
    """Whose folder the pictures are, also behind an unchanged manifest of `fedmpt prepare` without `min_labels`."""
    if data.source != "manifest":
        return data.source
    try:
        record = json.loads(record_path(Path(data.path)).read_text(encoding="utf-8"))
        unchanged = file_digest(Path(data.path)) == record["sha256"]
        whole = unchanged and record["options"]["min_labels"] == 0
        return str(record["kind"]) if whole else data.source
    except (OSError, ValueError, KeyError, TypeError):
        return data.source  # no record, or none of ours
