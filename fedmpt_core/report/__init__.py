"""The privacy report of a run, for a data protection officer: plain values, HTML, Markdown. No network, no prints."""
