"""What the adapter is: maps of its size and rank, its spectra, the rank it needs, and how it grew."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from lamina.report import charts
from lamina.report.chapters.words import fine_percent, layer_name, loss, percent, rows_of, slight
from lamina.report.charts import Chart, Line
from lamina.report.drawing import thin
from lamina.report.forms import Cell, Explanation, Matrix, Ranks
from lamina.report.kept import Kept
from lamina.report.ledger import History
from lamina.report.page import Page

COLUMNS = 20
"""Steps in the map of growth."""
LISTED = 12
"""Matrices that did not move."""
_COMPUTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def adapter(page: Page, kept: Kept) -> None:
    """Adds the chapter of the update."""
    section = page.section(
        "What the update is",
        "The adapter adds ΔW = scale · B·A to each matrix W. How large that is, of what rank, and where.",
    )
    found = kept.explanation
    if found is None:
        section.note("There is no explanation.json; lamina explain says the same in the console.")
        return
    if found.changes_nothing:
        section.note("This adapter changes nothing: B·A is zero in every matrix.")
        return
    section.chart(*_maps(found, kept.ledger))
    section.chart(_shares(found), *_spectrum(found.matrices))
    section.chart(_energy(found), *([_ranks(found.ranks, kept.counted)] if found.ranks else []))
    if found.ranks is None:
        section.note(f"No held-out loss at lower ranks: {found.not_measured or 'it was not measured'}.")


def growth(page: Page, kept: Kept) -> None:
    """Adds the chapter of the ledger."""
    section = page.section("How it grew", "The ledger holds the norms of every adapted matrix after every step.")
    if kept.card is not None:
        for note in kept.card.ledger_notes:
            section.text(note)
    if kept.ledger is None:
        section.note("There is no ledger.parquet.")
        return
    still = [place for n, place in enumerate(kept.ledger.places) if not kept.ledger["update_norm"][-1, n] > 0]
    if still:
        named = ", ".join(f"layer {place.layer} {place.module}" for place in still[:LISTED])
        more = f", and {len(still) - LISTED} more" if len(still) > LISTED else ""
        section.text(f"{len(still)} of {len(kept.ledger.places)} matrices did not move: {named}{more}.")
    else:
        section.text(f"All {len(kept.ledger.places)} matrices moved.")
    section.chart(_total(kept.ledger), _by_layer(kept.ledger))


def _maps(found: Explanation, ledger: History | None) -> list[Chart]:
    relative = {(cell.layer, cell.module): cell.relative for cell in found.map}
    if not any(relative.values()) and ledger is not None:
        relative = _from_ledger(found.map, ledger)
    if any(relative.values()):
        first = _map(
            found.map,
            "Size of the update",
            "‖ΔW‖/‖W‖: by how much of its norm each matrix was changed. Strong rows are the modules, strong columns the layers that "
            "carry the task.",
            lambda cell: None if (share := relative.get((cell.layer, cell.module))) is None else 100 * share,
            "‖ΔW‖/‖W‖ (%)",
        )
    else:
        first = _map(
            found.map,
            "Size of the update",
            "‖ΔW‖ of each matrix. Strong rows are the modules, strong columns the layers that carry the task; large matrices have "
            "larger norms.",
            lambda cell: cell.norm,
            "‖ΔW‖",
        )
    second = _map(
        found.map,
        "Effective rank",
        f"Over how many equal directions each update is spread, of {found.rank}. Where it is close to that, more rank might be used; "
        "where it is close to 1, a few directions do it all.",
        lambda cell: cell.effective_rank,
        "effective rank",
    )
    return [first, second]


def _from_ledger(cells: Sequence[Cell], ledger: History) -> dict[tuple[str, str], float | None]:
    """The last ‖ΔW‖/‖W‖ of the ledger, in the cells of the map."""
    last = {
        (str(place.layer), place.module.rpartition(".")[2]): float(ledger["relative"][-1, n])
        for n, place in enumerate(ledger.places)
    }
    return {(c.layer, c.module): last.get((layer_name(c.layer), c.module.rpartition(".")[2])) for c in cells}


def _map(cells: Sequence[Cell], title: str, caption: str, value: Callable[[Cell], float | None], label: str) -> Chart:
    layers = list(dict.fromkeys(cell.layer for cell in cells))
    modules = _in_order(cell.module for cell in cells)
    values = {(cell.module, cell.layer): value(cell) for cell in cells}
    table = [[values.get((module, layer)) for layer in layers] for module in modules]
    return charts.heat(title, caption, (modules, [*map(layer_name, layers)]), table, ("module", "layer", label))


def _in_order(modules: Iterable[str]) -> list[str]:
    """The modules in the order in which a layer computes them; others behind."""
    known = {name: n for n, name in enumerate(_COMPUTED)}
    return sorted(dict.fromkeys(modules), key=lambda name: known.get(name.rpartition(".")[2], len(known)))


def _shares(found: Explanation) -> Chart:
    shares: Mapping[str, float] = found.shares.module
    names, largest = _in_order(shares), max(shares, key=lambda name: shares[name])
    return charts.bars(
        "Which modules carry it",
        f"Shares of ‖ΔW‖². {largest} has the largest, {percent(shares[largest])}; equal parts would be {percent(1 / len(shares))} each.",
        names,
        {"share of ‖ΔW‖² (%)": [100 * shares[name] for name in names]},
        "share of ‖ΔW‖² (%)",
    )


def _spectrum(matrices: Sequence[Matrix]) -> list[Chart]:
    """Singular values relative to the largest: median over the matrices, and the middle four fifths of them."""
    scaled = [
        [v / m.singular_values[0] for v in m.singular_values]
        for m in matrices
        if m.norm > 0 and m.singular_values[0] > 0
    ]
    if not scaled:
        return []
    length = max(map(len, scaled))
    columns = [[line[n] for line in scaled if len(line) > n] for n in range(length)]
    low, high = ([float(np.quantile(column, q)) for column in columns] for q in (0.1, 0.9))
    x = list(range(1, length + 1))
    chart = charts.lines(
        "Singular values",
        "Each relative to the largest of its matrix: median of all matrices, and the band in which four of five lie. A steep fall means "
        "that few directions carry the update.",
        [Line("median", x, [statistics.median(column) for column in columns], band=(low, high))],
        "number of the singular value",
        "share of the largest",
    )
    return [chart]


def _energy(found: Explanation) -> Chart:
    x, y = [one.rank for one in found.energy], [100 * one.share for one in found.energy]
    fits = next((one.rank for one in found.energy if one.share >= 0.99 and one.rank < found.rank), None)
    said = "No lower one keeps 99\u00a0%." if fits is None else f"Rank {fits} keeps 99\u00a0%."
    return charts.lines(
        "Energy at lower ranks",
        f"Share of ‖ΔW‖² that is left when every matrix is truncated to a rank. {said}",
        [Line("share that is left", x, y, style="points")],
        "rank",
        "share of ‖ΔW‖² (%)",
        log="x",
    )


def _ranks(ranks: Ranks, counted: str) -> Chart:
    x = [one.rank for one in ranks.truncated]
    top = 2 * max(x, default=1)
    where = (
        f" Measured on {ranks.rows:,} of {rows_of(ranks.held_out_rows)}." if ranks.rows < ranks.held_out_rows else ""
    )
    if ranks.adapter_loss >= ranks.base_loss:
        done = "The adapter is not better than the base here, so no rank can be said to do."
    elif slight(ranks.base_loss - ranks.adapter_loss, ranks.base_loss):
        done = "The adapter is hardly better than the base here, so no rank can be said to do."
    elif ranks.enough is None:
        done = "None of the lower ranks would have done."
    else:
        kept = next(one.loss for one in ranks.truncated if one.rank == ranks.enough)
        done = f"Rank {ranks.enough} would have done: its loss is {loss(kept)}, within 1\u00a0% of the improvement."
    return charts.lines(
        "Which rank would have done",
        f"The held-out loss with the adapter truncated to lower ranks. {done}{where}",
        [
            Line("truncated", x, [one.loss for one in ranks.truncated], style="points"),
            Line("as trained", [1, top], [ranks.adapter_loss] * 2, "third", "dashed"),
            Line("base", [1, top], [ranks.base_loss] * 2, "base", "dashed"),
        ],
        "rank",
        f"loss (nats per {counted[:-1]})",
        log="x",
        marks=[] if ranks.enough is None else [(float(ranks.enough), "enough")],
    )


def _total(ledger: History) -> Chart:
    steps = ledger.steps.tolist()
    norms = _together(ledger["update_norm"])
    half = next((step for step, norm in zip(steps, norms, strict=True) if norm >= norms[-1] / 2), steps[-1])
    return charts.lines(
        "The whole update",
        f"‖ΔW‖ of all matrices together. Half of its last value was reached at step {half:,}. It should level off as the learning rate "
        "falls.",
        [Line("‖ΔW‖", steps, norms)],
        "step",
        "‖ΔW‖ (Frobenius)",
    )


def _by_layer(ledger: History) -> Chart:
    of = np.array([place.layer for place in ledger.places])
    layers = sorted(set(of.tolist()))
    columns = thin(range(len(ledger.steps)), COLUMNS)
    norms = [_together(ledger["update_norm"][columns][:, of == layer]) for layer in layers]
    last = [row[-1] for row in norms]
    strongest = layers[max(range(len(last)), key=lambda n: last[n])]
    share = last[layers.index(strongest)] ** 2 / (sum(value**2 for value in last) or 1.0)
    return charts.heat(
        "Layer by layer",
        f"‖ΔW‖ of each layer over the steps. At the end layer {strongest} has the largest part, {fine_percent(share)} of the squared norm.",
        ([str(layer) for layer in layers], [str(ledger.steps[n]) for n in columns]),
        norms,
        ("layer", "step", "‖ΔW‖ (Frobenius)"),
    )


def _together(norms: NDArray[np.float32]) -> list[float]:
    """The norm of matrices together at each step, from the norm of each, [S, M]."""
    found: list[float] = np.linalg.norm(norms.astype(np.float64), axis=1).tolist()
    return found
