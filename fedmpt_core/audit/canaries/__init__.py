"""Canary runs: lower bounds on epsilon from planted records."""
