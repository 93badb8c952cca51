"""Masking secure aggregation FLARE-SA/2: the server learns the sum of the sites' vectors and nothing else of them."""
