"""Audit of a downloaded run by somebody who trusts nobody: files in, findings out. No torch, no network, no prints."""
