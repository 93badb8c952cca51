"""The command line in this process, as the tests of `fedmpt` have it."""

from tests.unit.cli.conftest import fedmpt

__all__ = ["fedmpt"]
