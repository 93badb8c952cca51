"""What it costs: epsilon of a history by independent accountants, and the noise for an epsilon."""
