"""Reports: plots and one self-contained HTML page of a run."""
