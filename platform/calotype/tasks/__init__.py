"""One body per job: plain functions of (config, worker), no Ray and no MLflow needed."""
