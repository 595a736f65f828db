"""What `scripts/study.py` is made of: simulated ranks and seeds, data, experiments, results, figures, the report."""
