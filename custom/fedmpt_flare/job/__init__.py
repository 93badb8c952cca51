"""A job as FLARE takes it: recipe and simulation."""
