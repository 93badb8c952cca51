"""What all sites agree on and what a site allows: sections, their bounds, and how they are read from TOML."""
