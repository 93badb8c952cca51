"""Abstract conditions: fixed words for why labels occur together. `presets` reads the versioned lists."""
