"""Methods to compare FedMPT with, each from its paper's description, on the same towers, loss, rounds and privacy."""
