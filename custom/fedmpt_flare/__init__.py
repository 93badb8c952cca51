"""FedMPT on NVIDIA FLARE: recipe, executor, workflow and command line. Moves bytes and plain values; no arithmetic."""
