"""Everything that needs an NVIDIA GPU, in one run of under ten minutes. Run: ``make gpu``."""
