"""Patch features of the frozen towers, computed once and kept at the site."""
