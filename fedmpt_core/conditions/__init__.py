"""Finding abstract conditions, fixed words for why labels occur together. Offline: class names in, a list out."""
