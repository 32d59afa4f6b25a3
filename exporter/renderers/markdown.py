"""The report as Markdown: what was made, whether it is right, what it costs, how fast it is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from exporter.records import Artefact, Cost, Parity, Report, SizeRecord, Source, TensorSpec
from exporter.renderers import _data as data
from exporter.renderers import _execution as execution
from exporter.renderers import _figures as figures
from exporter.renderers import _ladder as ladder
from exporter.renderers import _latency as latency
from exporter.renderers import _quantised as quantised
from exporter.renderers import _sizes as sizes
from exporter.renderers import _stages as stages
from exporter.renderers import plots

_PLACES = (
    " Of the largest scores each place is compared: its value, and the reference's own score of "
    "its label; what is farther off counts. So a label is right where its score is as good. "
    "Agreement is of the first, and the margin that it has left is not known."
)


def render(report: Report) -> str:
    """Return the report as one Markdown page."""
    sections = (
        _head(report),
        _artefacts(report),
        _ladder(report),
        _execution(report),
        _losses(report),
        _quantised(report),
        _parity(report),
        _sizes(report),
        _calibration(report),
        _fold(report),
        _cost(report),
        _latency(report),
        _worth(report),
        _stages(report),
        _environment(report),
    )
    return "\n".join(line for section in sections for line in (*section, ""))


def summary(report: Report) -> str:
    """Return the head of the page and its first table."""
    return "\n".join((*_head(report), "", *_artefacts(report)))


def _head(report: Report) -> list[str]:
    source = report.source
    return [
        f"# {_escape(source.model)}: {report.verdict.upper()}",
        "",
        _escape(report.profile["about"]) + ".",
        "",
        f"- {_named('input', source.inputs)} {source.input.dtype}, "
        f"{_named('output', source.graph_outputs)}{_top(source)}, ONNX opset {source.opset}, "
        f"batch {_batch(report)}",
        *([f"- made by {_escape(source.factory)}"] if source.factory else []),
        *([f"- given as a module, {_escape(source.given)}"] if source.given else []),
        *([f"- made from the ONNX file {_escape(source.file)}"] if source.file else []),
        f"- {source.parameters:,} parameters; weights {_escape(source.weights)}, "
        f"SHA-256 {source.weights_sha256}{_format(source)}",
        *(
            f"- {'file' if source.file else 'weights'}: {_escape(change)}"
            for change in source.weights_changes
        ),
        f"- calibrated on {_escape(report.calibration)}"
        if report.calibration
        else "- not calibrated",
        *(f"- {_escape(line)}" for line in data.data_lines(report.data)),
    ]


def _named(what: str, specs: Sequence[TensorSpec]) -> str:
    found = (f"{_escape(spec.name)} {'×'.join(('N', *spec.said))}" for spec in specs)
    return f"{what}{'s' if len(specs) > 1 else ''} {', '.join(found)}"


def _top(source: Source) -> str:
    if source.top_k is None:
        return ""
    (classes,), name = source.top_k.scores.shape, _escape(source.top_k.scores.name)
    return f" (the {source.top_k.k} largest of {classes} of {name}, labels in INT64)"


def _format(source: Source) -> str:
    return f" ({_escape(source.weights_format)})" if source.weights_format else ""


def _batch(report: Report) -> str:
    batch = report.profile["batch"]
    return f"{batch['min']} to {batch['max']}, tuned for {batch['opt']}"


def _artefacts(report: Report) -> list[str]:
    lines = ["## Artefacts", "", *_table(figures.heads(report), figures.rows(report))]
    if report.failures:
        lines += ["", *(f"- **{_escape(failure)}**" for failure in report.failures)]
    if report.unproven:
        lines += ["", *(f"- Not enough evidence: {_escape(said)}" for said in report.unproven)]
    lines += [""]
    lines += [f"- {v.precision}: {_escape(note)}" for v in report.variants for note in v.notes]
    lines += [
        f"- {artefact.name}: {_escape(note)}"
        for artefact in report.artefacts
        for note in (*_targets(artefact), *artefact.notes)
    ]
    lines += [f"- In doubt: {_escape(doubt)}." for doubt in report.doubts]
    return lines


def _targets(artefact: Artefact) -> tuple[str, ...]:
    if not artefact.targets or not artefact.build_seconds:
        return ()
    targets = ", ".join(artefact.targets)
    return (f"one engine for {targets}, built in {artefact.build_seconds:.1f} s",)


def _ladder(report: Report) -> list[str]:
    return [
        "## Fidelity: does each artefact compute the graph that was asked for?",
        "",
        *_table(ladder.HEADS, ladder.steps(report)),
        "",
        "Each step's error is ‖y − r‖ / ‖r‖ on the held-out samples, beside the step it came from "
        f"and beside float64 {_escape(report.source.reference)}; flips are samples whose largest "
        "output is another one. × its precision is the error end to end in multiples of what "
        "rounding to the declared types must cause, emulated on the graph that was asked for; "
        "layers are compared one by one, on the artefact's own tensors, each in multiples of its "
        "own rounding.",
        *([""] if any(ladder.findings(report)) else []),
        *(f"- {_escape(line)}" for line in ladder.findings(report)),
    ]


def _execution(report: Report) -> list[str]:
    """Show in which type each layer that was asked for fewer bits really ran."""
    asked = [artefact for artefact in report.artefacts if artefact.execution]
    if not asked:
        return []
    lines = [
        "## Did it happen?",
        "",
        "Of every layer whose weights are stored in fewer than 32 bits, the type it ran in, as the "
        "runtime tells it. What is read from an engine that was not run is a hint; what is not "
        "told is not taken to have happened.",
        "",
    ]
    for artefact in asked:
        lines += [f"- {artefact.name}: {_escape(line)}" for line in execution.happened(artefact)]
        if artefact.execution:
            lines += [f"  - {_escape(line)}" for line in execution.missed(artefact.execution)]
    return lines


def _worth(report: Report) -> list[str]:
    """Show whether fewer bits were faster, and what to ship."""
    lines = [execution.compared(report, one) for one in report.comparisons]
    lines += execution.recommended(report)
    if not lines:
        return []
    return [
        "## Was it worth it?",
        "",
        "Medians of latency beside those of FP32 and FP16 on the same runtime, with the 95 % "
        "interval of their ratio (bootstrap over rounds, as all were timed in turn); there is no "
        "significant difference where that comes within 1 % of 1.",
        "",
        *(f"- {_escape(line)}" for line in lines),
    ]


def _losses(report: Report) -> list[str]:
    """Show what each layer loses by its precision, for the precisions that lose."""
    lossy = [variant for variant in report.variants if variant.losses]
    if not lossy:
        return []
    names = list(dict.fromkeys(loss.layer for variant in lossy for loss in variant.losses))
    by_name = [{loss.layer: loss for loss in variant.losses} for variant in lossy]
    return [
        "## What each layer loses by its precision",
        "",
        *_table(
            ("layer", *(variant.precision for variant in lossy)),
            ((name, *(ladder.share(part.get(name)) for part in by_name)) for name in names),
        ),
        "",
        "Each layer by itself, from inputs in FP32: the error of its output, and in brackets its "
        "worst channel in multiples of what the precision must lose there. Well above 1 it loses "
        "more, say because values beyond the calibrated range are clipped.",
    ]


def _quantised(report: Report) -> list[str]:
    """Show what each repair brought, and what each tensor came to."""
    lines: list[str] = []
    if rows := list(quantised.repairs(report)):
        lines += [
            "## What each repair brought",
            "",
            *_table(quantised.REPAIRS, rows),
            "",
            "SQNR of the outputs beside the float network's, on calibration samples that the step "
            "was not made from, with everything before it that was kept; activations and weights "
            "quantised throughout.",
        ]
    for variant in quantised.quantised(report):
        lines += [
            *([""] if lines else []),
            f"## What each quantised tensor came to: {variant.precision}",
            "",
            *_table(quantised.TENSORS, quantised.tensors(variant)),
            "",
            "On calibration samples. Saturated is the share of values beyond the last step; dead "
            "channels are 0 throughout; the part in the output's error is to first order, and all "
            "parts add up to 100 %.",
        ]
    return lines


def _parity(report: Report) -> list[str]:
    source = report.source
    heads = (
        *(f"compared with float64 {source.reference}", "on", "largest error"),
        *("relative L2", "SQNR"),
        *("1 − cosine", "top-1 agreement", "proven", "margin used", "classes"),
        *("accuracy", "accuracy drop", "× float32 noise", "gates", "verdict"),
    )
    named = [(source.single, parity, "") for parity in report.pytorch]
    named += [(a.name, parity, parity.verdict) for a in report.artefacts for parity in a.parity]
    shares = (parity.reference_accuracy for parity in report.pytorch)
    reference = next((share for share in shares if share is not None), None)
    labelled = f", accuracy {figures.share(reference)}" if reference is not None else ""
    return [
        "## Quality: is that graph good enough?",
        "",
        *_table(heads, (_parity_row(name, parity, said) for name, parity, said in named)),
        "",
        f"The reference is the unfolded network in float64{labelled}. "
        "Relative L2 is ‖y − r‖ / ‖r‖ over all samples, SQNR is −20 log₁₀ of it, cosine is the "
        f"smallest of one sample, and the float32 noise is {_escape(source.single)}'s own relative "
        "L2 against float64 on the same inputs. Proven is the agreement "
        "that so many samples prove with 95 % confidence (Clopper-Pearson), and behind the drop "
        "in accuracy stands from where to where they prove it to lie, each end with 95 % "
        "confidence (exact, for pairs). The margin used is how much of the distance between its "
        "largest output and the next an error has eaten up in the worst sample: from 100 % on, "
        "the sample flips. Classes are the different largest outputs of the reference, of so many "
        "different labels. A gate on agreement or accuracy is met where the samples prove it, and "
        "missed where they prove that; between the two there is not enough evidence."
        + (_PLACES if report.source.top_k else ""),
        *_not_run(report),
    ]


def _parity_row(name: str, parity: Parity, said: str) -> Sequence[str]:
    return (
        name,
        parity.inputs if parity.output is None else f"{parity.output!r} of {parity.inputs}",
        figures.number(parity.max_abs),
        figures.number(parity.rel_l2),
        figures.decibels(parity.sqnr_db),
        figures.one_minus(parity.cosine),
        figures.share(parity.agreement),
        figures.proven(parity),
        figures.margin(parity),
        figures.classes(parity),
        figures.share(parity.accuracy),
        figures.drop(parity),
        figures.number(parity.noise_multiple, ".3g"),
        figures.gates(parity) if said else "",
        said,
    )


def _not_run(report: Report) -> list[str]:
    missing = [a for a in report.artefacts if a.not_run and not a.refused]
    return [""] * bool(missing) + [
        f"- {a.name}: built, not run: {_escape(a.not_run or '')}. Its numbers are not checked."
        for a in missing
    ]


def _sizes(report: Report) -> list[str]:
    """Show every artefact at each size that was checked, where height or width are free."""
    own = sizes.optimum(report)
    if own is None:
        return []
    counts = next((f"{s.samples} held-out samples" for s in report.sizes), "no sample")
    drawn = next((f"{s.noise} of noise" for s in report.sizes), "none of noise")
    folds = ", ".join(f"{_fold_error(s)} at {s.name}" for s in report.sizes)
    return [
        "## Sizes: is it right at every height and width?",
        "",
        *_table(sizes.HEADS, sizes.rows(report)),
        "",
        f"Engines are tuned for {own}, where cost and latency are taken, and all samples are "
        f"compared. At the other sizes {counts} are resized (bilinear, smoothed), and {drawn} are "
        "drawn; each artefact is held to the same gate of fidelity, from the emulation of its "
        "graph in that size, and compared with the network in float64. The profile's gates on "
        f"tensors hold there too; {sizes.LABELS}. Between these sizes nothing was run.",
        "",
        f"Folded against unfolded, both in float64: relative L2 {folds}.",
    ]


def _fold_error(size: SizeRecord) -> str:
    if size.float64_rel_l2 is None:
        return "not finite" if size.refused is None else "not checked"
    return f"{size.float64_rel_l2:.1e}"


def _calibration(report: Report) -> list[str]:
    found = report.calibrated
    if found is None:
        return []
    settled = (
        f"{name} from {count:,} on" if count else f"{name} not within these"
        for name, count in found.settled.items()
    )
    rows = (
        (f"{count:,}", *(f"{curve.largest[at]:.2%}" for curve in found.curves))
        for at, count in enumerate(found.counts)
    )
    return [
        "## Calibration: do the scales stand still?",
        "",
        f"{found.samples:,} samples, {found.tensors} tensors. Settled: {'; '.join(settled)}.",
        "",
        *_table(("samples", *(curve.calibrator for curve in found.curves)), rows),
        "",
        "The largest relative distance of a tensor's scale to its final one, in the order that the "
        "samples were given. Settled is from where on it is never above "
        f"{found.WITHIN:.0%}, at most half of the samples, since the last ones agree with "
        f"themselves. Drawn in {plots.CALIBRATION}.",
    ]


def _fold(report: Report) -> list[str]:
    fold = report.fold
    error = "not finite" if fold.float64_rel_l2 is None else f"{fold.float64_rel_l2:.1e}"
    alone = f" {fold.unmeasured} folds were not measured one by one." if fold.unmeasured else ""
    return [
        "## BatchNorm",
        "",
        f"{fold.folded} of {len(fold.fates)} folded. Folded against unfolded, both in float64: "
        f"relative L2 {error}.{alone}",
        "",
        *(f"- {_escape(str(fate))}" for fate in fold.fates),
    ]


def _cost(report: Report) -> list[str]:
    costs = {v.precision: v.cost for v in report.variants if v.cost}
    if not costs:
        return ["## Cost", "", "No graph was made, so none was counted."]
    totals = [
        (
            precision,
            f"{cost.macs:,}",
            f"{cost.flops:,}",
            f"{cost.parameters:,}",
            f"{cost.weight_bytes:,}",
            f"{cost.activation_bytes:,}",
            "" if cost.peak_bytes is None else f"{cost.peak_bytes:,} at {cost.peak_layer}",
            "" if cost.intensity is None else f"{cost.intensity:.1f}",
            ", ".join(f"{n} × {op}" for op, n in cost.uncounted.items()) or "none",
        )
        for precision, cost in costs.items()
    ]
    heads = (
        *("graph", "MACs", "FLOPs", "parameters", "weight bytes", "activation bytes"),
        *("peak bytes", "FLOPs/byte", "not counted"),
    )
    precision, first = next(iter(costs.items()))
    return [
        "## Cost of one sample",
        "",
        *_at_optimum(report, "One sample of"),
        "Counted on the deployed graphs, after folding; a multiply-accumulate (MAC) is two FLOPs. "
        "Activation bytes are what the nodes write, summed; DequantizeLinear is taken to be read "
        "where it stands, and writes none. Peak bytes are of the activations that exist at once, "
        "a node's inputs and outputs both; FLOPs/byte counts each byte that a node reads, weights "
        "included, or writes.",
        "",
        *_table(heads, totals),
        "",
        f"Layer by layer, {precision}:",
        "",
        *_layers(first),
    ]


def _at_optimum(report: Report, what: str) -> list[str]:
    """Say which size figures are of, where there are others."""
    own = sizes.optimum(report)
    return [] if own is None else [f"{what} {own}, which engines are tuned for.", ""]


def _layers(cost: Cost) -> list[str]:
    heads = ("layer", "operator", "output", "MACs", "parameters", "weight bytes", "output bytes")
    return _table(
        heads,
        (
            (
                layer.name,
                layer.op,
                "×".join(map(str, layer.output_shape)),
                f"{layer.macs:,}",
                f"{layer.parameters:,}",
                f"{layer.weight_bytes:,}",
                f"{layer.activation_bytes:,}",
            )
            for layer in cost.layers
        ),
    )


def _latency(report: Report) -> list[str]:
    rounds = max((latency.warmup for latency in report.latency), default=0)
    notes = (latency.SUPPORTED, latency.FAR, latency.RATE)
    return [
        "## Latency",
        "",
        *_at_optimum(report, "Pictures of"),
        latency.method(report.profile["timing"], rounds),
        "",
        *_table(latency.HEADS, map(latency.row, report.latency)),
        "",
        *(f"- {_escape(note)}" for note in notes),
    ]


def _stages(report: Report) -> list[str]:
    return [
        "## Where the time went",
        "",
        f"{stages.whole(report)}.",
        "",
        *_table(stages.HEADS, stages.rows(report.stages)),
        "",
        *(f"- {note}." for note in stages.notes(report.stages)),
    ]


def _environment(report: Report) -> list[str]:
    versions = ", ".join(f"{key} {value}" for key, value in report.environment.items())
    versions = _escape(versions)
    return [
        "## Made with",
        "",
        f"{report.tool}; {versions}.",
    ]


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    body = [f"| {' | '.join(map(_escape, row))} |" for row in rows]
    return [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads), *body]


def _escape(text: str) -> str:
    """Return the text as Markdown that shows it, whatever a layer or a file is called."""
    text = "".join(c if c.isprintable() or c.isspace() else repr(c)[1:-1] for c in text)
    for character in "\\`*_[<|~&":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())
