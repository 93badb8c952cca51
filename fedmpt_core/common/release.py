"""Which release of this program runs here, and of what decides its results. Imports none of them."""

import platform
from importlib.metadata import PackageNotFoundError, version

RELEASE = version("fedmpt")
VERSIONED = (
    "fedmpt",
    "nvflare",
    "torch",
    "opacus",
    "dp-accounting",
    "open_clip_torch",
    "transformers",
    "timm",
    "numpy",
    "pillow",
)


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that decide a result."""
    versions = {"python": platform.python_version()}
    for name in VERSIONED:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
