"""A site's half: admission, session, masked updates."""
