"""A report, for people and programs. Pure functions: the same record always renders the same."""
