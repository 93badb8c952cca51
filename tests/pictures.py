"""Small real pictures in manifests of their own, for federations that train for real."""

from pathlib import Path

from fedmpt_core.config.site import DataConfig, SiteConfig
from fedmpt_core.data.manifest_rows import ManifestRow, write_manifest
from fedmpt_core.data.scenes import SceneConfig, scenes
from tests.settings import OPEN, POLICY

CLASSES = ("bus", "dog", "banana", "clock")
SPLITS = {"train": range(10), "val": range(10, 16), "test": range(16, 28)}


def small_sites(root: Path, count: int = 3) -> dict[str, SiteConfig]:
    """Sites with ten training pictures each; the first also judges. All share one feature cache."""
    sites = {}
    for s in range(count):
        folder = root / f"site-{s + 1}"
        folder.mkdir()
        rows = []
        for split, places in SPLITS.items():
            data = scenes(SceneConfig(s), site=0, sites=1, split="test", count=400)
            index = [data.classes.index(c) for c in CLASSES]
            chosen = [i for i in range(400) if data.targets[i, index].any()]
            for i in (chosen[place] for place in places):
                data.pictures[i].load().resize((112, 112)).save(folder / f"{i}.png")
                labels = tuple(c for c, k in zip(CLASSES, index, strict=True) if data.targets[i, k])
                rows.append(ManifestRow(f"{i}.png", labels, split))
        write_manifest(rows, folder / "manifest.csv")
        sites[folder.name] = SiteConfig(
            DataConfig(path=str(folder / "manifest.csv"), evaluate=s == 0),
            cache_dir=str(root / "cache"),
            privacy=POLICY,
            secagg=OPEN,
            device="cpu",
            threads=1,
        )
    return sites
