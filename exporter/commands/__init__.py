"""Commands that are more than a call: each a file, registered in ``exporter/cli.py``."""
