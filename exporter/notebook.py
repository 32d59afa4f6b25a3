"""The whole export of a module that a program holds, in one call: `export`.

What it returns shows itself where it is the last line of a notebook's cell.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from exporter.bars import bars
from exporter.contracts import Progress, Session, silent
from exporter.data import Data
from exporter.errors import BuildError, GraphError, RuntimeMissing, UnknownName
from exporter.live import live_model, shapes_of, usual_torch
from exporter.pipeline import run
from exporter.plugins import load_runtime, remedy
from exporter.profile import Profile, load_profile
from exporter.records import Artefact, Report, Verdict
from exporter.renderers import html, markdown
from exporter.shipped import is_intact


@dataclass(frozen=True, slots=True, repr=False)
class Exported:
    """What an export made: its report, and the folder of its bundle."""

    report: Report
    folder: Path

    @property
    def verdict(self) -> Verdict:
        """Return the report's verdict in one word, or a few."""
        return self.report.verdict

    def raise_for_parity(self) -> None:
        """Raise `ParityError` if a gate was missed, or could not be shown to be met."""
        self.report.raise_for_parity()

    def session(
        self, precision: str | None = None, runtime: str | None = None
    ) -> AbstractContextManager[Session]:
        """Return an artefact to open with ``with``; called with a feed it gives the outputs.

        Without names it is the first that runs here. A feed has the inputs by name, ``{"input":
        array}``, in the shape and type of `report.source.input`, and so have the outputs.

        Raises `UnknownName` if there is no such artefact, `BuildError` for one that could not be
        made, `RuntimeMissing` for one that cannot run here, and `GraphError` for a file that is
        not what was made.
        """
        artefact = self._artefact(precision, runtime)
        if artefact.refused or artefact.file is None:
            raise BuildError(f"{artefact.name} was not made: {artefact.refused}")
        chosen = load_runtime(artefact.runtime, self.report.profile["runtime"][artefact.runtime])
        if reason := chosen.missing("run"):
            raise RuntimeMissing(
                f"{artefact.name} cannot run here: {reason}",
                hint=remedy(artefact.runtime, reason),
            )
        if not is_intact(artefact.file, self.folder):
            raise GraphError(
                f"{artefact.file.name} is not the file that the export made", hint="export it anew"
            )
        return chosen.open(self.folder / artefact.file.name)

    def _artefact(self, precision: str | None, runtime: str | None) -> Artefact:
        """Return the first of those asked for that ran, or the first that did not."""
        found = [
            artefact
            for artefact in self.report.artefacts
            if precision in (None, artefact.precision) and runtime in (None, artefact.runtime)
        ]
        if not found:
            wanted = " on ".join(filter(None, (precision, runtime)))
            raise UnknownName("artefact", wanted, [a.name for a in self.report.artefacts])
        return min(found, key=lambda artefact: bool(artefact.not_run or artefact.refused))

    def __repr__(self) -> str:
        made = ", ".join(variant.precision for variant in self.report.variants if variant.file)
        name = self.report.source.model
        return f"<Exported {name}: {self.verdict}; {made} in {str(self.folder)!r}>"

    def _repr_html_(self) -> str:
        return html.summary(self.report, self.folder)

    def _repr_markdown_(self) -> str:
        return markdown.summary(self.report)


def export(
    module: nn.Module,
    example_inputs: object,
    *,
    out: str | Path = "build",
    profile: str | Path | Profile = "default",
    precision: str | Sequence[str] | None = None,
    data: Data | None = None,
    calibration: Data | None = None,
    allow_overlap: bool = False,
    name: str | None = None,
    progress: Progress | bool = False,
) -> Exported:
    """Export a module as it is in memory, check it, time it, and write the bundle into ``out``.

    ``example_inputs`` is a tensor (N, C, H, W); of several inputs a tuple of those, or a dict by
    the names that forward() has for them. Their shapes count. The module is left as it was; what is
    exported is a copy, in eval mode and in float32 on the CPU. ``precision`` picks one or several
    of the profile's, ``name`` is the network's in the report and in its files, its class's if left
    out. ``data`` and ``calibration`` may be arrays or tensors of inputs, dicts of those,
    (inputs, labels) or a dataset, or words, as for `exporter.run`, whose call this is.
    ``progress=True`` shows bars; in a notebook these need ipywidgets.

    Raises `GraphError` and `InputRefused` for a module that cannot be exported (`live_model`) or an
    example that is none, and otherwise as `exporter.run`.
    """
    chosen = profile if isinstance(profile, Profile) else load_profile(profile)
    if precision is not None:
        chosen = chosen.only((precision,) if isinstance(precision, str) else tuple(precision))
    folder = Path(os.path.abspath(out))  # noqa: PTH100 - the bundle stays there if the program moves
    shape = shapes_of(example_inputs, module)
    with usual_torch(), _told(progress) as told:
        report = run(
            live_model(module, shape, name=name),
            chosen,
            folder,
            calibration=calibration,
            data=data,
            allow_overlap=allow_overlap,
            progress=told,
        )
    return Exported(report, folder)


@contextmanager
def _told(progress: Progress | bool) -> Iterator[Progress]:
    if progress is True:
        from rich.console import Console

        with bars(Console()) as shown:
            yield shown
    else:
        yield progress or silent
