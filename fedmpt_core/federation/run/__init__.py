"""What a run leaves: record, manifest, curves, predictions."""
