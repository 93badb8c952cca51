"""The server's half: rounds, averaging, participation, checkpoints."""
