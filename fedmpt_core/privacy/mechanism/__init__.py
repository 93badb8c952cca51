"""What runs: sampling, per-record gradients, clipping, noise, and the test of it all before any record is used."""
