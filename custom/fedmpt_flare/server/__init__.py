"""At the server: the workflow and what it writes."""
