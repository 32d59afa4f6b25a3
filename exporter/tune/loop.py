"""The search itself: sensitivities, candidates, one interleaved timing, the choice, its test."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter

import msgspec

from exporter import environment
from exporter.axes import at_optimum
from exporter.contracts import Session
from exporter.errors import BuildError, GraphError, with_hint
from exporter.flops import count_flops
from exporter.intervals import FEWEST_PAIRS
from exporter.latency import measure_latency
from exporter.profile import Profile
from exporter.records import (
    SCHEMA,
    Budget,
    Candidate,
    Comparison,
    Latency,
    Parity,
    Sensitivity,
    Timing,
    TuneReport,
)
from exporter.renderers import pareto, tuning
from exporter.tune import search
from exporter.tune.bench import Bench
from exporter.version import TOOL

_USEFUL = 0.5  # accuracy below which a drop in it says little
_TRYING, _TIMING = 0.6, 0.2  # of the minutes: until when candidates are begun, and for latency
LIGHT = " light"  # in a candidate's name: kept in the order of error against work


@dataclass(slots=True)
class Search:
    """One search: a bench, what is wanted of it, and how long it may look around."""

    bench: Bench
    budget: Budget
    minutes: float
    start: float = field(default_factory=perf_counter)
    candidates: list[Candidate] = field(default_factory=list)
    skipped: int = 0

    def run(self) -> TuneReport:
        """Search, choose, confirm, and write the folder's results."""
        job = self.bench.job
        sensitivities = self._sensitivities()
        for name in job.precisions:
            if name != self.bench.precision:
                self.candidates.append(self.bench.judge(name, name))
        self._try_counts(sensitivities)
        sessions = self._open()
        doubts = self._time(sessions)
        chosen, nearest = search.choose(self.candidates, self.budget)
        confirmation = self._confirm(chosen, sessions[chosen.name]) if chosen else ()
        report = TuneReport(
            schema=SCHEMA,
            tool=TOOL,
            source=job.source(),
            profile=msgspec.json.decode(msgspec.json.encode(job.profile)),
            environment=environment.capture(),
            calibration=job.calibration.origin if job.calibration else "nothing",
            precision=self.bench.precision,
            runtime=self.bench.runtime_name,
            budget=self.budget,
            validation=self.bench.validation.origin,
            sensitivities=tuple(sensitivities),
            candidates=tuple(self.candidates),
            front=search.front(self.candidates),
            choice=chosen.name if chosen else None,
            nearest=nearest.name if nearest else None,
            confirmation=confirmation,
            findings=tuple(self._findings(chosen)),
            doubts=(*self._doubts_of_accuracy(), *doubts),
            stages=job.stages.so_far,
        )
        self._write(report)
        return report

    # ── Sensitivities and candidates ────────────────────────────────────────────────

    def _sensitivities(self) -> list[Sensitivity]:
        state, bench = self.bench.state, self.bench
        layers = (
            list(state.saved.layers) if state.saved.layers else state.set_layers(bench.layers())
        )
        if not layers:
            raise GraphError(f"{bench.precision} quantises no layer of this network")
        what = f"quantise each of {len(layers)} layers alone"
        with bench.job.stage(what, len(layers)) as advance:
            for layer in layers:
                if state.sensitivity(layer) is None:
                    state.add(bench.sensitivity(layer, layers))
                advance()
        return [found for layer in layers if (found := state.sensitivity(layer))]

    def _try_counts(self, sensitivities: list[Sensitivity]) -> None:
        """Find the fewest layers to keep in both orders, then fill the row while there is time."""
        by_error = search.ranked(sensitivities)
        light = search.ranked(sensitivities, self._work())
        if self.budget.tolerance.bounds():
            self._bisect(light, LIGHT)
            self._bisect(by_error, "")
        for count in search.grid(len(light)):
            self._try(count, light, LIGHT)

    def _work(self) -> dict[str, int]:
        """Return what keeping a layer costs: parameters where size is wanted, else MACs."""
        budget = self.budget
        by_size = budget.objective == "size" or (
            budget.objective == "sqnr" and budget.max_latency is None
        )
        layers = count_flops(at_optimum(self.bench.graph)).layers
        return {layer.name: layer.parameters if by_size else layer.macs for layer in layers}

    def _bisect(self, order: list[str], suffix: str) -> None:
        tried: dict[int, bool] = {}
        while (count := search.next_count(tried, len(order))) is not None:
            good = self._try(count, order, suffix)
            if good is None:
                return
            tried[count] = good

    def _try(self, count: int, order: list[str], suffix: str) -> bool | None:
        """Return whether keeping the first layers is good enough; None if there is no time left."""
        precision, keep = self.bench.precision, self.bench.keeping(order[:count])
        known = next((c for c in self.candidates if c.keep == keep), None)
        if known is None:
            is_known = self.bench.state.candidate(precision, keep) is not None
            if count and not is_known and self._is_late():
                self.skipped += 1
                return None
            word = {0: "none", len(order): "all"}.get(count, f"{count}{suffix}")
            beside = self.candidates if count == len(order) else ()
            known = self.bench.judge(f"{precision} keeping {word}", precision, keep, beside=beside)
            self.candidates.append(known)
        return known.is_good_enough(self.budget)

    def _is_late(self) -> bool:
        return perf_counter() - self.start > _TRYING * 60 * self.minutes

    # ── Latency ─────────────────────────────────────────────────────────────────────

    def _open(self) -> dict[str, Session]:
        """Open every candidate that was made, to stay open; note those that refuse."""
        sessions: dict[str, Session] = {}
        for index, candidate in enumerate(self.candidates):
            if candidate.refused is None and candidate.same_as is None:
                try:
                    sessions[candidate.name] = self.bench.session(candidate)
                except BuildError as error:
                    self.candidates[index] = msgspec.structs.replace(
                        candidate, refused=with_hint(error), parity=()
                    )
        if not sessions:
            reasons = "; ".join(dict.fromkeys(c.refused or "" for c in self.candidates))
            raise GraphError(f"no candidate could be made: {reasons}")
        return sessions

    def _time(self, sessions: dict[str, Session]) -> tuple[str, ...]:
        """Time all of them in turn, and return the reasons not to trust that."""
        job = self.bench.job
        timing = self._timing(sessions)
        size = timing.batches[0]
        others = environment.OtherLoad()
        found = measure_latency(
            sessions,
            {size: job.timed_feeds(size)},
            timing,
            progress=partial(job.stage, part="latency"),
        )
        by_name = {latency.name: latency for latency in found}
        self.candidates = [
            msgspec.structs.replace(candidate, latency=by_name.get(candidate.name))
            for candidate in self.candidates
        ]
        return (*others.doubt(), *_too_few(timing.runs), *_unsteady(found))

    def _timing(self, sessions: dict[str, Session]) -> Timing:
        """Return the profile's timing at its first batch size, with as many runs as there is time.

        A candidate's turn takes a run and what it settles for before, or one run if that is longer.
        """
        timing = self.bench.job.profile.timing
        feed = self.bench.job.feed(timing.batches[0])
        turn = 0.0
        for session in sessions.values():
            step = session.bind(feed)
            step()
            start = perf_counter()
            step()
            seconds = perf_counter() - start
            turn += seconds + max(seconds, timing.settle_ms / 1e3)
        runs = int(_TIMING * 60 * self.minutes / turn) - 2 * timing.warmup
        runs = min(timing.runs, max(runs, FEWEST_PAIRS))
        return msgspec.structs.replace(timing, batches=timing.batches[:1], runs=runs)

    # ── The choice ──────────────────────────────────────────────────────────────────

    def _confirm(self, chosen: Candidate, session: Session) -> tuple[Parity, ...]:
        """Hold the choice against float64 PyTorch on the evaluation samples."""
        job = self.bench.job
        samples, truth = job.held_out, job.start.double()
        total = 2 * -(-len(samples.inputs) // job.profile.batch.opt)
        what = f"{chosen.name}: confirm on the {samples.origin}"
        with job.stage(what, total, part="evidence") as advance:
            want, got = (job.outputs(run, samples.inputs, advance) for run in (truth, session))
        return self.bench.compared(want, got, samples, self.budget.tolerance)

    def _findings(self, chosen: Candidate | None) -> Iterator[str]:
        """Yield whether the precision pays here, and what was not tried, one sentence each."""
        yield from does_it_pay(
            self.candidates,
            self.bench.precision,
            set(self.bench.state.saved.layers),
            self.bench.runtime_name,
        )
        if self.skipped:
            yield (
                f"{self.skipped} more candidates were not tried, as the time for that "
                f"was up ({_TRYING:.0%} of {self.minutes:g} minutes): call it again, and they are"
            )
        if chosen is None:
            yield f"no candidate keeps the budget: {self.budget}"

    def _doubts_of_accuracy(self) -> Iterator[str]:
        parities = (parity for c in self.candidates for parity in c.parity)
        known = (parity.reference_accuracy for parity in parities)
        accuracy = next((share for share in known if share is not None), None)
        if accuracy is not None and accuracy < _USEFUL:
            yield (
                f"the network itself labels only {accuracy:.1%} of the validation samples "
                "correctly, so that a drop in accuracy says little"
            )

    def _write(self, report: TuneReport) -> None:
        state, chosen = self.bench.state, report.chosen
        state.write("tune.json", tuning.to_json(report))
        state.write("tune.md", tuning.to_markdown(report))
        state.write("pareto.svg", pareto.render(report))
        if chosen:
            profile = tuned(self.bench.job.profile, chosen)
            state.write("tuned.toml", tuning.profile_comment(report) + profile.to_toml())
        else:
            state.remove("tuned.toml")
        state.finish()


def tuned(profile: Profile, chosen: Candidate) -> Profile:
    """Return the profile that makes the chosen candidate.

    A mixture replaces ``keep`` of its precision; a precision that is as the profile has it is left
    alone in it.
    """
    if chosen.keep is None:
        return profile.only((chosen.precision,))
    choice = profile.precision[chosen.precision]
    options = {**choice.options, "keep": list(chosen.keep)}
    mixed = msgspec.structs.replace(choice, options=options)
    return msgspec.structs.replace(
        profile, precision={**profile.precision, chosen.precision: mixed}
    )


def does_it_pay(
    candidates: list[Candidate], precision: str, layers: set[str], runtime: str
) -> Iterator[str]:
    """Yield one sentence: whether a candidate of the precision is faster than others.

    One that keeps every layer in float counts for the others.
    """
    ours: list[tuple[str, Latency]] = []
    others: list[tuple[str, Latency]] = []
    for candidate in candidates:
        if candidate.latency is not None:
            is_ours = candidate.keep is not None and not layers <= set(candidate.keep)
            (ours if is_ours else others).append((candidate.name, candidate.latency))
    if not ours or not others:
        return
    (name, fast), (other, slow) = (min(side, key=lambda p: p[1].p50_ms) for side in (ours, others))
    said = (
        f"on {runtime} the fastest candidate with {precision.upper()} layers, {name}, takes "
        f"{fast.p50_ms:.2f} ms, and {other} takes {slow.p50_ms:.2f} ms"
    )
    speed = Comparison.of(fast, slow).speed
    pays = {"faster": "pays here", "too few samples": "is not shown to pay here"}
    yield f"{precision.upper()} {pays.get(speed, 'does not pay here')}: {said} ({speed})"


def _too_few(runs: int) -> Iterator[str]:
    if runs < FEWEST_PAIRS:
        yield (
            f"every candidate was timed {runs} times, and with fewer than {FEWEST_PAIRS} none is "
            "shown to be faster than another"
        )


def _unsteady(found: tuple[Latency, ...]) -> Iterator[str]:
    unsteady = {x.name: x.p90_ms / x.p50_ms for x in found if x.is_unsteady}
    if unsteady:
        worst = max(unsteady, key=lambda name: unsteady[name])
        yield (
            f"the latency of {len(unsteady)} of {len(found)} candidates is unsteady: that of "
            f"{worst} has a p90 of {unsteady[worst]:.1f} times its p50"
        )
    changing = [x for x in found if x.steady is False]
    if changing:
        yield (
            f"the latency of {len(changing)} of {len(found)} candidates was still changing after "
            f"{changing[0].warmup} warm-up rounds, say that of {changing[0].name}"
        )
