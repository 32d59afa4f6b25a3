"""How sensitive is the fidelity gate? Conversion bugs, seeded on purpose, and honest runs.

    nets      five small networks whose BatchNorms do something
    bugs      the catalogue: what goes wrong between PyTorch and a file, each made on purpose
    judge     one artefact before the gate, as `exporter.ladder` puts it there
    honest    runs in which nothing is wrong: every one that fails is a false alarm

A gate is worth what it catches and what it lets through. Run: ``make mutation``.
"""
