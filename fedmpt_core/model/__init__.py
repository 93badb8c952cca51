"""Towers, cached features, FedMPT and the methods beside it."""
