"""A bench: what was asked for, what was timed, and what follows from it."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

from exporter.records.asked import SEED, Timing
from exporter.records.base import MOST_THREADS, Asked, Found, Ranges, Verdict, worst
from exporter.records.latency import Latency
from exporter.records.worth import Comparison

_SAME = 1e-3  # of relative L2: what another order of sums may do, and another input never does
_KNEE = 0.9
_MOST_LOADS = 20
_WANDERS = 0.05  # of a GPU's clock
_DISTURBED = 0.5  # involuntary context switches per turn


class BenchAsked(Asked, frozen=True):
    """What to time. Nothing of ``batches``, ``threads`` or ``runtimes``: as the bundles have it.

    With ``seconds``, each batch size is timed that long in place of ``runs`` rounds. Each file is
    loaded ``loads`` times, and the loads take turns.
    """

    runtimes: tuple[str, ...] = ()
    batches: tuple[int, ...] = ()
    threads: tuple[int, ...] = ()
    runs: int | None = None
    seconds: float | None = None
    budget_ms: float | None = None
    loads: int = 5
    seed: int = 0

    RANGES: ClassVar[Ranges] = {"seed": SEED}

    def __post_init__(self) -> None:
        Asked.__post_init__(self)
        for name, values in (("batch", self.batches), ("threads", self.threads)):
            if any(value < 1 for value in values):
                raise ValueError(f"{name} must be 1 or more, found {min(values)}")
            if len(set(values)) < len(values):
                raise ValueError(f"{name} has a value twice: {', '.join(map(str, values))}")
        if any(threads > MOST_THREADS for threads in self.threads):
            raise ValueError(f"threads may be {MOST_THREADS} at most, found {max(self.threads)}")
        if self.runs is not None and self.seconds is not None:
            raise ValueError("need runs or seconds, found both")
        if self.runs is not None and self.runs < 2:
            raise ValueError(f"runs must be 2 or more, found {self.runs}")
        for name, value in (("seconds", self.seconds), ("budget", self.budget_ms)):
            if value is not None and not 0 < value < 1e6:
                raise ValueError(f"{name} must be above 0 and below 1e6, found {value:g}")
        if not 1 <= self.loads <= _MOST_LOADS:
            raise ValueError(f"loads must be from 1 to {_MOST_LOADS}, found {self.loads}")


class Checked(Found, frozen=True):
    """Whether what was timed was real.

    ``timed`` of the timed runs' outputs were compared with those of the same session called untimed
    on the same inputs, and ``farthest`` is the largest relative L2 between the two. ``correct`` of
    ``samples`` labelled samples are labelled correctly, and ``recorded`` is what the bundle's
    record says of that, None where it says nothing.
    """

    timed: int = 0
    farthest: float = 0.0
    correct: int | None = None
    recorded: int | None = None
    samples: int = 0

    @property
    def outputs(self) -> Verdict:
        """Return whether timed runs compute what untimed ones do."""
        if not self.timed:
            return "not checked"
        return "pass" if self.farthest <= _SAME else "fail"

    @property
    def accuracy(self) -> Verdict:
        """Return whether it labels as many correctly as the parity run that made the bundle."""
        if self.recorded is None or self.correct is None:
            return "not checked"
        return "pass" if self.correct == self.recorded else "fail"


class Timed(Found, frozen=True):
    """One candidate: a file of a bundle in a runtime, with so many threads.

    ``load_ms`` is from the file to the first session of it, and ``first_ms`` the first call of
    that, at the first batch size; neither is in any other figure.
    """

    name: str
    bundle: str
    precision: str
    runtime: str
    threads: int
    file: str
    sha256: str
    load_ms: float
    first_ms: float
    checked: Checked = Checked()
    notes: tuple[str, ...] = ()


class NotTimed(Found, frozen=True):
    """A candidate that was not timed, and why."""

    name: str
    reason: str


class Noise(Found, frozen=True):
    """What else the machine did meanwhile; None where the system does not tell.

    ``load_average`` is of the minute before, ``others`` the share of the processors that other
    processes took, and ``switches`` how often this process was put aside, in ``turns`` turns.
    """

    cores: int
    load_average: float | None
    others: float | None
    switches: int | None
    turns: int

    @property
    def doubts(self) -> tuple[str, ...]:
        """Return why the machine is noisy, one sentence each."""
        said = []
        if self.load_average is not None and self.load_average > self.cores:
            said.append(
                f"the machine is noisy: a load average of {self.load_average:.1f} on {self.cores} "
                "processors before"
            )
        if self.switches is not None and self.switches > _DISTURBED * self.turns:
            said.append(
                f"the machine is noisy: {self.switches:,} involuntary context switches in "
                f"{self.turns:,} turns"
            )
        return tuple(said)


class Gpu(Found, frozen=True):
    """What a GPU's sensors said between timed runs: from the least to the most.

    ``slowed`` is what held it back, and in how many of the ``readings``.
    """

    name: str
    readings: int
    sm_mhz: tuple[int, int]
    memory_mhz: tuple[int, int]
    celsius: tuple[int, int]
    watts: tuple[float, float]
    slowed: dict[str, int] = {}  # noqa: RUF012 - msgspec copies it

    @property
    def doubts(self) -> tuple[str, ...]:
        """Return why figures taken on it may not hold, one sentence each."""
        said = [
            f"{self.name} was slowed by {why} in {count} of {self.readings} readings"
            for why, count in self.slowed.items()
        ]
        low, high = self.sm_mhz
        if low < (1 - _WANDERS) * high:
            said.append(f"the clock of {self.name} went from {low} to {high} MHz: it is not locked")
        return tuple(said)

    def __str__(self) -> str:
        ranges = (
            ("SM clock", "MHz", self.sm_mhz),
            ("memory clock", "MHz", self.memory_mhz),
            ("temperature", "°C", self.celsius),
            ("power", "W", self.watts),
        )
        said = [f"{what} {low:.0f} to {high:.0f} {unit}" for what, unit, (low, high) in ranges]
        return f"{self.name}: {', '.join(said)}, in {self.readings} readings between timed runs"


class Fit(NamedTuple):
    """The largest batch within the budget, None if none is; with ``missing`` samples more for some.

    Within: the upper end of the 95 % interval of the p90 is at most the budget.
    """

    name: str
    batch: int | None
    missing: int


class Knee(NamedTuple):
    """The smallest batch that gives 90 % or more of the most images/s seen, and that most.

    None where that is the largest batch that was timed, so that more might be had beyond it.
    """

    name: str
    batch: int | None
    per_second: float
    most: float
    most_batch: int


class BenchReport(Found, frozen=True):
    """The record of one bench; everything else follows from it.

    ``on_device`` are times by the device's own clock, which are compared with no wall-clock time.
    """

    schema: int
    tool: str
    environment: dict[str, str]
    asked: BenchAsked
    timing: Timing
    samples: tuple[str, ...]
    timed: tuple[Timed, ...]
    not_timed: tuple[NotTimed, ...]
    latency: tuple[Latency, ...]
    noise: Noise
    doubts: tuple[str, ...]
    on_device: tuple[Latency, ...] = ()
    gpu: Gpu | None = None

    @property
    def verdict(self) -> Verdict:
        """Return whether what was timed was real: a pass is a pass of every check."""
        said = {v for t in self.timed for v in (t.checked.outputs, t.checked.accuracy)}
        return "not checked" if said == {"pass", "not checked"} else worst(said)

    @property
    def failures(self) -> tuple[str, ...]:
        said = []
        for one in self.timed:
            checked = one.checked
            if checked.outputs == "fail":
                said.append(
                    f"{one.name}: a timed run's outputs are {checked.farthest:.2g} from those of "
                    f"an untimed one on the same inputs, relative L2, and may be {_SAME:g}"
                )
            if checked.accuracy == "fail":
                said.append(
                    f"{one.name}: labels {checked.correct} of {checked.samples} samples correctly, "
                    f"and the bundle's record says {checked.recorded}"
                )
        return tuple(said)

    @property
    def batches(self) -> tuple[int, ...]:
        return self.timing.batches

    def at(self, batch: int) -> tuple[Latency, ...]:
        """Return the latencies at one batch size."""
        return tuple(one for one in self.latency if one.batch == batch)

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        """Return every candidate beside the first one, at each batch size."""
        return tuple(
            Comparison.of(one, first)
            for batch in self.batches
            for first, *others in [self.at(batch)]
            for one in others
        )

    @property
    def level(self) -> dict[int, tuple[str, ...]]:
        """Return the fastest at each batch size, and after it those not shown to be slower."""
        found = {}
        for batch in self.batches:
            fastest, *others = sorted(self.at(batch), key=lambda one: one.p50_ms)
            alike = (o.name for o in others if Comparison.of(o, fastest).speed != "slower")
            found[batch] = (fastest.name, *alike)
        return found

    @property
    def knees(self) -> tuple[Knee, ...]:
        """Return where each candidate's throughput levels off, if two batch sizes were timed."""
        if len(self.batches) < 2:
            return ()
        found = []
        for one in self.timed:
            own = sorted((x for x in self.latency if x.name == one.name), key=lambda x: x.batch)
            best = max(own, key=lambda x: x.per_second)
            knee = next(x for x in own if x.per_second >= _KNEE * best.per_second)
            batch = knee.batch if knee is not own[-1] else None
            found.append(Knee(one.name, batch, knee.per_second, best.per_second, best.batch))
        return tuple(found)

    @property
    def fits(self) -> tuple[Fit, ...]:
        """Return the largest batch within the budget, of those that were timed."""
        budget, found = self.asked.budget_ms, []
        if budget is None:
            return ()
        for one in self.timed:
            p90s = {x.batch: x.figure(90.0) for x in self.latency if x.name == one.name}
            within = [b for b, p90 in p90s.items() if p90.interval and p90.interval[1] <= budget]
            missing = max(p90.missing for p90 in p90s.values())
            found.append(Fit(one.name, max(within, default=None), missing))
        return tuple(found)
