"""At a site: executor, trainer process, guards."""
