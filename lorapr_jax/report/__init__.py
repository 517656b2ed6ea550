"""What a run shows: progress, log, summary and report."""
