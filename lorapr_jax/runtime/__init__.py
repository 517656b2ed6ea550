"""Files, processes, signals and devices: what a run stands on."""
