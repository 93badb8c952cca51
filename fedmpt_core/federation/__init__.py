"""A job over sites and server, and what it leaves. Knows nothing of the framework that carries it."""
