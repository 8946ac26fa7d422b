"""Ray: where bodies run, and the embedded stack."""
