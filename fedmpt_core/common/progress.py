"""How far long work is, for whoever waits."""

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with what is done and what there is in all."""
StageProgress = Callable[[str, int, int], None]
"""The same for work in stages: called with the stage first."""
