"""The built-in profiles: one TOML file per target, installed as ``exporter.profiles``."""
