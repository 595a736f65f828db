"""What the study must show: sentences that are true or not of the results, in whole and in small."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from study_parts.results import Results

EXPECTED_INVARIANCE = {  # Zhang & Sennrich 2019, table 1, and GroupNorm by the same reasoning
    "weight matrix × 3": "BN LayerNorm RMSNorm GroupNorm",
    "weight matrix + same row": "LayerNorm GroupNorm",
    "one weight vector × 3": "BN",
    "data × 3": "BN LayerNorm RMSNorm GroupNorm",
    "data + same sample": "BN",
    "one sample × 3": "LayerNorm RMSNorm GroupNorm",
}


class Gate(NamedTuple):
    """One sentence, what was measured, and whether it holds."""

    experiment: str
    sentence: str
    measured: str
    holds: bool


def check(results: Results) -> list[Gate]:
    """All gates whose experiments have been run."""
    return [gate for name, gates in GATES.items() if results.has(name) for gate in gates(results)]


def _batch(results: Results) -> Iterator[Gate]:
    def error(method: str, batch: int | None = None) -> float:
        return results.value("batch_mlp", "error", method=method, lr=0.03, batch=batch).mean

    local, renorm, mabn = (error(method, 2) for method in ("BN", "BatchRenorm", "MABN"))
    group, sync = error("GroupNorm"), error("SyncBN")

    def gate(sentence: str, holds: bool, **values: float) -> Gate:
        return Gate("batch_mlp", sentence, ", ".join(f"{k} {v:.2f} %" for k, v in values.items()), holds)

    yield gate("at 2 samples per rank local BN errs on more than 20 %", local > 20, BN=local)
    yield gate(
        "local BN errs at least three times as often as BatchRenorm", local > 3 * renorm, BN=local, renorm=renorm
    )
    yield gate("BatchRenorm errs more often than GroupNorm", renorm > group, renorm=renorm, GroupNorm=group)
    yield gate("GroupNorm and MABN are within one point", abs(group - mabn) < 1, GroupNorm=group, MABN=mabn)
    yield gate("MABN errs as often as SyncBN or more, up to half a point", mabn > sync - 0.5, MABN=mabn, SyncBN=sync)
    yield gate("SyncBN errs on less than 3.5 %", sync < 3.5, SyncBN=sync)
    for batch in (b for b in results.levels("batch_mlp", "batch", method="BN") if b >= 8):
        local = error("BN", batch)
        yield gate(f"at {batch} samples BN is at least as good as GroupNorm", local <= group, BN=local, GroupNorm=group)


def _lag(results: Results) -> Iterator[Gate]:
    average, precise = (
        results.value("lagging_statistics", f"error_{kind}", momentum=0.001, step=50).mean
        for kind in ("average", "recalibrated")
    )
    yield Gate(
        "lagging_statistics",
        "at momentum 0.001 and step 50 the averages err on more than 20 %, recalibrated statistics on less than 12 %",
        f"{average:.1f} % and {precise:.1f} %",
        average > 20 and precise < 12,
    )


def _non_iid(results: Results) -> Iterator[Gate]:
    local, renorm = (results.value("non_iid", "error", method=m, batch=4).mean for m in ("BN", "BatchRenorm"))
    sync = results.value("non_iid", "error", method="SyncBN").mean
    yield Gate(
        "non_iid",
        "on shards sorted by label, 4 samples per rank: BN errs more than BatchRenorm and five times as often as SyncBN",
        f"BN {local:.1f} %, BatchRenorm {renorm:.1f} %, SyncBN {sync:.1f} %",
        local > renorm and local > 5 * sync,
    )


def _rate(results: Results) -> Iterator[Gate]:
    sync, none = (results.value("learning_rate", "error", method=m, lr=0.3).mean for m in ("SyncBN", "none"))
    yield Gate(
        "learning_rate",
        "at a learning rate of 0.3 SyncBN learns (below 5 %) and the net without norms does not (above 20 %)",
        f"{sync:.1f} % and {none:.1f} %",
        sync < 5 and none > 20,
    )


def _scale(results: Results) -> Iterator[Gate]:
    sync, none = (results.value("initial_scale", "error", method=m, scale=0.01).mean for m in ("SyncBN", "none"))
    yield Gate(
        "initial_scale",
        "from weights a hundred times too small SyncBN learns (below 8 %) and the net without norms does not (above 50 %)",
        f"{sync:.1f} % and {none:.1f} %",
        sync < 8 and none > 50,
    )


def _dropout(results: Results) -> Iterator[Gate]:
    before, last = (results.value("dropout_order", "variance_ratio", place=p).mean for p in ("before", "last"))
    yield Gate(
        "dropout_order",
        "dropout before norms halves the variance they meet in evaluation; before the last layer alone it changes none",
        f"{before:.2f} and {last:.2f} of the remembered variance",
        before < 0.7 and 0.9 < last < 1.1,
    )


def _tables(results: Results) -> Iterator[Gate]:
    raw, batch, layer = (
        results.value("tables", "error", table="wine", scaling=s).mean
        for s in ("raw", "BN on the input", "LN on the input")
    )
    yield Gate(
        "tables",
        "wine: raw features and LayerNorm over features fail (above 20 %), BN on the input serves (below 8 %)",
        f"{raw:.1f} %, {layer:.1f} % and {batch:.1f} %",
        min(raw, layer) > 20 and batch < 8,
    )


def _style(results: Results) -> Iterator[Gate]:
    instance, none = (results.value("style", "style_error", norm=n).mean for n in ("InstanceNorm", "none"))
    yield Gate(
        "style",
        "a probe does not find the exposure behind InstanceNorm (chance errs on 75 %), and finds it without (below 20 %)",
        f"{instance:.1f} % and {none:.1f} %",
        instance > 60 and none < 20,
    )


def _gan(results: Results) -> Iterator[Gate]:
    batch, group = (
        results.value("gan", "company_noise", critic=c).mean for c in ("BN, real and fake apart", "GroupNorm")
    )
    yield Gate(
        "gan",
        "behind BN a critic's score depends on the company (more than 0.2 of its spread), behind GroupNorm not at all",
        f"{batch:.2f} and {group:.1g}",
        batch > 0.2 and group < 1e-4,
    )


def _rl(results: Results) -> Iterator[Gate]:
    apart, together = (
        results.value("rl_target", "relative_error", target=f"BN, batches {t}").mean for t in ("apart", "together")
    )
    yield Gate(
        "rl_target",
        "BN on states and next states apart errs three times as much as on both together",
        f"{apart:.2f} and {together:.2f} of the spread of values",
        apart > 3 * together,
    )


def _invariance(results: Results) -> Iterator[Gate]:
    wrong = []
    for change, invariant in EXPECTED_INVARIANCE.items():
        for norm in results.levels("invariance", "norm"):
            moved = results.value("invariance", "moved", norm=norm, change=change).mean
            if (moved < 1e-12) != (norm in invariant.split()) or 1e-12 <= moved < 1e-3:
                wrong.append(f"{norm} under {change}: {moved:.1g}")
    yield Gate(
        "invariance",
        "invariances are those of the RMSNorm paper's table: below 1e-12 or above 1e-3",
        "; ".join(wrong) or "all of them",
        not wrong,
    )


def _attribution(results: Results) -> Iterator[Gate]:
    none, layer, rms = (
        results.value("attribution", "completeness", norm=n).mean for n in ("none", "LayerNorm", "RMSNorm")
    )
    yield Gate(
        "attribution",
        "gradient × input sums to the logit without a norm (within 1e-9), and to 0 behind LayerNorm and RMSNorm",
        f"{none:.9f} of it, {layer:.0e} and {rms:.0e}",
        abs(none - 1) < 1e-9 and max(abs(layer), abs(rms)) < 1e-9,
    )


def _ranks(results: Results) -> Iterator[Gate]:
    gap = max(float(row[column]) for row in results.rows("simulated_ranks") for column in ("parameters", "statistics"))
    yield Gate(
        "simulated_ranks",
        "four gloo ranks under DDP train as the simulated ones, to 1e-10 in weights and statistics",
        f"{gap:.0e}",
        gap < 1e-10,
    )


GATES: dict[str, Callable[[Results], Iterator[Gate]]] = {
    "batch_mlp": _batch,
    "lagging_statistics": _lag,
    "non_iid": _non_iid,
    "learning_rate": _rate,
    "initial_scale": _scale,
    "dropout_order": _dropout,
    "tables": _tables,
    "style": _style,
    "gan": _gan,
    "rl_target": _rl,
    "invariance": _invariance,
    "attribution": _attribution,
    "simulated_ranks": _ranks,
}
