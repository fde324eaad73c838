"""Runnable experiments: configs, one run (main), comparisons and their figures."""
