"""Commands that are more than a call: each a file, registered in ``exporter/cli.py``.

That hands them what shows things, as ``ctx.obj``: ``bars()``, a context that gives a `Progress`,
and ``show(what, width)``.
"""
