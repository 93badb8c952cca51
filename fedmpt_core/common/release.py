"""Which release of this program runs here, and of what decides its results. Imports none of them."""

import platform
from importlib.metadata import PackageNotFoundError, version

RELEASE = version("fedmpt")
PROGRAM = f"fedmpt {RELEASE}"
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


def named(package: str) -> str:
    """A package as a record names it: `opacus 1.5.4`, or that it is not installed here."""
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package}, not installed here"


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that decide a result."""
    versions = {"python": platform.python_version()}
    for name in VERSIONED:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
