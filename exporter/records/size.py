"""What is found at the sizes of an input that are checked beside the one it is tuned for."""

from __future__ import annotations

from exporter.records.base import Found, Verdict, whole, worst
from exporter.records.fidelity import Fidelity
from exporter.records.quality import Parity

FOLD_LIMIT = 1e-9  # of the fold in float64, relative L2: rounding stays far below it


class _AtSize(Found, frozen=True):
    height: int
    width: int

    @property
    def name(self) -> str:
        return f"{self.height} × {self.width}"


class SizeRecord(_AtSize, frozen=True):
    """The network itself at one height and width: what the artefacts are compared with there.

    ``samples`` are held-out ones in that size, and ``noise`` is drawn in it; ``float64_rel_l2``
    compares the folded network with the unfolded one, both in float64, None if a value is not
    finite. ``graph`` compares the FP32 graph, in exact arithmetic, with the network. ``refused``
    says why one of the two could not be run.
    """

    samples: int
    noise: int
    float64_rel_l2: float | None = None
    graph: Fidelity | None = None
    refused: str | None = None

    @property
    def failures(self) -> tuple[str, ...]:
        if self.refused:
            return (f"at {self.name}: {self.refused}",)
        bad = []
        if self.float64_rel_l2 is None or self.float64_rel_l2 > FOLD_LIMIT:
            by = "to NaN" if self.float64_rel_l2 is None else f"by {self.float64_rel_l2:.1e}"
            bad.append(f"folding moves the network {by}")
        bad += (f"the FP32 graph: {why}" for why in (self.graph.failures if self.graph else ()))
        return tuple(f"at {self.name}: {why}" for why in bad)


class SizeCheck(_AtSize, frozen=True):
    """One artefact at one height and width: as at the size it is tuned for, on fewer samples.

    ``parity`` has no figures of classes, since pictures in another size are not the held-out ones.
    ``refused`` says why it gave nothing there that could be compared; without it and without a
    fidelity it did not run.
    """

    parity: tuple[Parity, ...] = ()
    fidelity: Fidelity | None = None
    refused: str | None = None

    @property
    def failures(self) -> tuple[str, ...]:
        if self.refused:
            return (f"at {self.name}: {self.refused}",)
        bad = self.fidelity.failures if self.fidelity else ()
        missed = (failure for parity in self.parity for failure in parity.failures)
        return (*(f"at {self.name}: {why}" for why in bad), *missed)

    @property
    def faithful(self) -> Verdict:
        """Return whether it computes the graph that was asked for there."""
        if self.refused:
            return "fail"
        return self.fidelity.verdict if self.fidelity else "not checked"

    @property
    def quality(self) -> Verdict:
        """Return whether that is good enough, which is what the profile's gates say."""
        if self.refused:
            return "fail"
        on: dict[str, list[Verdict]] = {}
        for parity in self.parity:
            on.setdefault(parity.inputs, []).append(parity.verdict)
        return worst(map(whole, on.values()))
