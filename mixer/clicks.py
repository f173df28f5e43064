"""What clicks say: where people look, and how much better "wanted" explains a photo's events on an item than "not".

Pure functions over Arrow tables; every rate is estimated from the logs themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

COUNTS = pa.schema(
    [
        ("query_id", pa.string()),
        ("item_id", pa.string()),
        ("position", pa.int32()),
        ("impressions", pa.int64()),
        ("clicks", pa.int64()),
        ("purchases", pa.int64()),  # carts counted in
        ("dwells", pa.int64()),  # clicks of which the dwell time is known
        ("log_dwell", pa.float64()),  # sum of ln(dwell_ms)
        ("log_dwell_squared", pa.float64()),  # sum of ln(dwell_ms)^2
    ]
)
_EM_ROUNDS = 50
_PRIOR_CLICKS, _PRIOR_VIEWS = 0.2, 2.0  # imagined on every pair, so that few views say little of where people look
# Imagined looks at items wanted and not, and the clicks on them: what holds where the logs show no contrast.
_PRIOR_LOOKS, _PRIOR_WANTED, _PRIOR_UNWANTED = 20.0, 8.0, 1.0
_TINY = 1e-9


@dataclass(frozen=True)
class Behaviour:
    """How people act towards items of one kind, wanted or not.

    rate: clicks a view that is looked at. dwell_mean, dwell_deviation: of ln(dwell_ms). bought: purchases a click.
    """

    rate: float
    dwell_mean: float
    dwell_deviation: float
    bought: float


@dataclass(frozen=True)
class ClickModel:
    """Clicks as a mixture of two behaviours; `share` of the pairs shown are wanted ones."""

    wanted: Behaviour
    unwanted: Behaviour
    share: float


def examination(counts: pa.Table, rounds: int = 30) -> np.ndarray:
    """Return the probability that a position is looked at, relative to the first, [positions].

    EM on P(click) = examined(position) * attractive(query, item), the position-based model of Craswell et al., "An
    experimental comparison of click position-bias models", WSDM 2008.
    """
    pair = pair_codes(counts)
    position = counts["position"].to_numpy()
    clicks, views = clicks_and_views(counts)
    positions, pairs = int(position.max(initial=-1)) + 1, int(pair.max(initial=-1)) + 1
    examined = np.linspace(1.0, 0.3, positions)
    attractive = np.full(pairs, _PRIOR_CLICKS / _PRIOR_VIEWS)
    seen = np.maximum(np.bincount(position, views, positions), _TINY)
    shown = np.bincount(pair, views, pairs) + _PRIOR_VIEWS
    for _ in range(rounds):
        at, of = examined[position], attractive[pair]
        unclicked = (views - clicks) / np.maximum(1 - at * of, _TINY)
        examined = np.bincount(position, clicks + unclicked * at * (1 - of), positions) / seen
        examined = np.clip(examined / max(examined.max(initial=0), _TINY), 1e-6, 1.0)
        attractive = np.bincount(pair, clicks + unclicked * of * (1 - at), pairs) + _PRIOR_CLICKS
        attractive = np.clip(attractive / shown, 0.0, 1.0)
    return examined


def pair_statistics(counts: pa.Table, examined: np.ndarray) -> pa.Table:
    """Sum the counts over positions: query_id, item_id, looks (views that were looked at), clicks, purchases, dwells...

    `counts` must be in the order of query_id and item_id; so is what returns. Logs without any impression say what was
    clicked but not what was passed over: then every click on a photo counts as a look at all that was clicked for it.
    """
    pair = pair_codes(counts)
    clicks, views = clicks_and_views(counts)
    looks = views * examined[counts["position"].to_numpy()]
    if not counts["impressions"].to_numpy().any():
        query, first = np.cumsum(begins(counts["query_id"])) - 1, np.diff(pair, prepend=-1) != 0
        looks = np.where(first, np.bincount(query, clicks)[query] if len(query) else clicks, 0.0)
    columns = {"looks": looks}
    columns |= {name: counts[name].to_numpy() for name in COUNTS.names[4:]}
    pairs = counts.select(["query_id", "item_id"]).filter(pa.array(np.diff(pair, prepend=-1) != 0))
    for name, values in columns.items():
        pairs = pairs.append_column(name, pa.array(np.bincount(pair, values, len(pairs))))
    return pairs


def fit_click_model(pairs: pa.Table) -> ClickModel:
    """Estimate the two behaviours and their share by EM; what the logs do not hold (dwell, purchases) tells nothing."""
    whole = _behaviour(pairs, np.ones(len(pairs)), _PRIOR_UNWANTED)
    spread = whole.dwell_deviation / 2
    model = ClickModel(
        Behaviour(
            _chance(4 * whole.rate), whole.dwell_mean + spread, whole.dwell_deviation, min(2 * whole.bought, 0.5)
        ),
        Behaviour(whole.rate / 2, whole.dwell_mean - spread, whole.dwell_deviation, whole.bought / 2),
        share=0.05,
    )
    for _ in range(_EM_ROUNDS):
        logit = evidence(pairs, model) + np.log(model.share / (1 - model.share))
        wanted = 1 / (1 + np.exp(-np.clip(logit, -50, 50)))
        share = float(np.clip(wanted.mean(), 1e-4, 1 - 1e-4)) if len(pairs) else model.share
        model = ClickModel(
            _behaviour(pairs, wanted, _PRIOR_WANTED), _behaviour(pairs, 1 - wanted, _PRIOR_UNWANTED), share
        )
    if model.wanted.rate < model.unwanted.rate:
        model = ClickModel(model.unwanted, model.wanted, 1 - model.share)
    return model


def evidence(pairs: pa.Table, model: ClickModel) -> np.ndarray:
    """Return ln P(events | wanted) - ln P(events | not), in nats, of each of `pair_statistics`' pairs, [pairs].

    Looks without a click speak too: for a wanted item they are rare.
    """
    return _log_likelihood(pairs, model.wanted) - _log_likelihood(pairs, model.unwanted)


def pair_codes(table: pa.Table) -> np.ndarray:
    """Number the pairs of query_id and item_id of a table in their order, int64 [rows]."""
    return np.cumsum(begins(table["query_id"]) | begins(table["item_id"])) - 1


def begins(column: pa.ChunkedArray) -> np.ndarray:
    """Return bool [rows]: where a value differs from the one before."""
    codes = pc.dictionary_encode(column).combine_chunks().indices.to_numpy()
    return np.diff(codes, prepend=-1) != 0


def clicks_and_views(counts: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Return clicks and views, float [rows]; an impression may be lost, so a click is a view too."""
    clicks = counts["clicks"].to_numpy().astype(float)
    return clicks, np.maximum(counts["impressions"].to_numpy().astype(float), clicks)


def _behaviour(pairs: pa.Table, weight: np.ndarray, prior: float) -> Behaviour:
    total = {name: float((weight * pairs[name].to_numpy()).sum()) for name in pairs.column_names[2:]}
    dwells = max(total["dwells"], _TINY)
    mean = total["log_dwell"] / dwells
    deviation = np.sqrt(max(total["log_dwell_squared"] / dwells - mean**2, 1e-2))
    bought = (weight * _purchases(pairs)).sum() / max(total["clicks"], _TINY)
    looks = np.maximum(pairs["looks"].to_numpy(), pairs["clicks"].to_numpy())
    rate = (total["clicks"] + prior) / ((weight * looks).sum() + _PRIOR_LOOKS)
    return Behaviour(_chance(rate), mean, float(deviation), _chance(bought))


def _chance(value: float) -> float:
    """Keep a probability away from what no number of events could prove."""
    return float(np.clip(value, 1e-4, 0.95))


def _log_likelihood(pairs: pa.Table, behaviour: Behaviour) -> np.ndarray:
    """Clicks are binomial in the looks, dwell times log-normal, purchases binomial in the clicks."""
    clicks, looks, dwells = (pairs[name].to_numpy() for name in ("clicks", "looks", "dwells"))
    total = clicks * np.log(behaviour.rate) + np.maximum(looks - clicks, 0) * np.log1p(-behaviour.rate)
    mean, deviation = behaviour.dwell_mean, behaviour.dwell_deviation
    squares = pairs["log_dwell_squared"].to_numpy() - 2 * mean * pairs["log_dwell"].to_numpy() + dwells * mean**2
    total -= dwells * np.log(deviation) + squares / (2 * deviation**2)
    bought = _purchases(pairs)
    return total + bought * np.log(behaviour.bought) + (clicks - bought) * np.log1p(-behaviour.bought)


def _purchases(pairs: pa.Table) -> np.ndarray:
    """A cart and a purchase after one click count once."""
    return np.minimum(pairs["purchases"].to_numpy(), pairs["clicks"].to_numpy())
