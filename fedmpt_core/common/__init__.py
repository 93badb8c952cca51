"""What every room needs: files, canonical JSON, signatures, text from strangers, the release. No torch, no config."""
