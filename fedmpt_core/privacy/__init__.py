"""Record-level differential privacy at a site: gradients, mechanism, accounting, ledger."""
