"""Where a model runs. One file per runtime; copy ``ort_cpu.py`` or see CONTRIBUTING.md.

Vendor packages are imported inside the methods that need them, so that every file here can be
imported, listed and type-checked on a machine that has none of them.
"""
