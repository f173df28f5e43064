"""What clicks say: where people look, and how much better "wanted" explains a photo's events on an item than "not".

Pure functions over Arrow tables; every rate is estimated from the logs themselves.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import NamedTuple

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
        ("carts", pa.int64()),
        ("purchases", pa.int64()),
        ("dwells", pa.int64()),  # clicks of which the dwell time is known
        ("log_dwell", pa.float64()),  # sum of ln(dwell_ms)
        ("log_dwell_squared", pa.float64()),  # sum of ln(dwell_ms)^2
    ]
)
_EM_ROUNDS = 1000
_SETTLED = 1e-4  # change, in a round, of how likely any pair is wanted
_MOST_ROWS = 200_000  # that the model is fitted to, about; it has few parameters
# Imagined looks at items wanted and not, and the clicks on them: what holds where the logs show no contrast.
_PRIOR_LOOKS, _PRIOR_WANTED, _PRIOR_UNWANTED = 20.0, 8.0, 1.0
_PRIOR_VIEWS = 20.0  # imagined of each position, looked at as often as EM begins with
_PRIOR_PLACED = 20.0  # imagined pairs at each place, of which as many are wanted as of all
_TINY = 1e-9
_log = logging.getLogger(__name__)


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
    """Clicks as a mixture of two behaviours; `share` of the pairs shown are wanted ones.

    examined: probability that a position is looked at, relative to the one that is looked at most, [positions].
    standing: what the engine's own order says, ln P(place | wanted) - ln P(place | not), in nats, [positions]; the
    place of an item is the mean of its positions.
    """

    wanted: Behaviour
    unwanted: Behaviour
    share: float
    examined: np.ndarray
    standing: np.ndarray


class _Events(NamedTuple):
    """Counts as arrays: pair, position, clicks and views of each row; place and sums over positions of each pair.

    Where no impression is logged, a row is a pair and all are at position 0. first: the rows of the counts at which a
    pair begins.
    """

    pair: np.ndarray
    position: np.ndarray
    clicks: np.ndarray
    views: np.ndarray
    place: np.ndarray
    sums: dict[str, np.ndarray]
    first: np.ndarray


def fit_click_model(counts: pa.Table) -> ClickModel:
    """Estimate from the logs how people act towards what they want and what they do not, where they look and where the
    engine puts what they want; what the logs do not hold (dwell, purchases, impressions) tells nothing.

    EM on P(click) = examined(position) * rate(wanted or not), the position-based model of Craswell et al., "An
    experimental comparison of click position-bias models", WSDM 2008, of which the attractiveness has two values. A
    place where few clicks are is looked at by few or holds little that is wanted: dwell, purchases and repeated views
    tell which; of what nothing tells, what EM begins with remains.

    `counts` must be in the order of query_id and item_id.
    """
    logged = _has_impressions(counts)
    positions = counts["position"].to_numpy().max(initial=-1) + 1 if logged else min(len(counts), 1)
    events = _events(_some_photos(counts), logged)
    guess = np.maximum((1.0 + np.arange(positions)) ** -0.5, 0.1)
    wanted = np.zeros(len(events.place))
    whole = _behaviour(events, np.ones(len(events.place)), _looked(events, guess, 0.0), _PRIOR_UNWANTED)
    spread = whole.dwell_deviation / 2
    model = ClickModel(
        Behaviour(
            _chance(4 * whole.rate), whole.dwell_mean + spread, whole.dwell_deviation, min(2 * whole.bought, 0.5)
        ),
        Behaviour(whole.rate / 2, whole.dwell_mean - spread, whole.dwell_deviation, whole.bought / 2),
        share=0.05,
        examined=guess,
        standing=np.zeros(len(guess)),
    )
    for _ in range(_EM_ROUNDS):
        odds = _evidence(events, model) + model.standing[events.place] + np.log(model.share / (1 - model.share))
        before, wanted = wanted, 1 / (1 + np.exp(-np.clip(odds, -50, 50)))
        looks = [_looked(events, model.examined, each.rate) for each in (model.wanted, model.unwanted)]
        model = ClickModel(
            _behaviour(events, wanted, looks[0], _PRIOR_WANTED),
            _behaviour(events, 1 - wanted, looks[1], _PRIOR_UNWANTED),
            share=float(np.clip(wanted.mean(), 1e-4, 1 - 1e-4)) if len(wanted) else model.share,
            examined=_examined(events, looks[1] + wanted[events.pair] * (looks[0] - looks[1]), guess),
            standing=_standing(events, wanted, len(guess)),
        )
        if np.abs(wanted - before).max(initial=0) < _SETTLED:
            break
    else:
        _log.info("the click model has not settled in %d rounds; it is used as it is", _EM_ROUNDS)
    if model.wanted.rate < model.unwanted.rate:
        model = ClickModel(model.unwanted, model.wanted, 1 - model.share, model.examined, -model.standing)
    return model


def evidence(counts: pa.Table, model: ClickModel) -> pa.Table:
    """Return query_id, item_id, clicks, evidence and standing of each pair, in the order of counts.

    evidence: ln P(events | wanted) - ln P(events | not), in nats. Looks without a click speak too: for a wanted item
    they are rare. standing: the same of its place.
    """
    events = _events(counts, _has_impressions(counts))
    pairs = counts.select(["query_id", "item_id"]).filter(pa.array(events.first))
    pairs = pairs.append_column("clicks", pa.array(events.sums["clicks"]))
    pairs = pairs.append_column("evidence", pa.array(_evidence(events, model)))
    return pairs.append_column("standing", pa.array(model.standing[events.place]))


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


def _has_impressions(counts: pa.Table) -> bool:
    return bool(counts["impressions"].to_numpy().any())


def _some_photos(counts: pa.Table) -> pa.Table:
    """Return the rows of some photos, spread evenly over all, if there are more than `_MOST_ROWS`."""
    share = _MOST_ROWS / max(len(counts), 1)
    photo = np.cumsum(begins(counts["query_id"])) - 1
    # Multiples of the golden ratio, modulo 1: no period of the ids is met.
    return counts.filter(pa.array(photo * 0.6180339887498949 % 1 < share)) if share < 1 else counts


def _events(counts: pa.Table, logged: bool) -> _Events:
    """Logs without any impression say what was clicked but not what was passed over, or where: then every click on a
    photo counts as a look at all that was clicked for it."""
    pair, position = pair_codes(counts), counts["position"].to_numpy()
    first = np.diff(pair, prepend=-1) != 0
    clicks, views = clicks_and_views(counts)
    pairs = int(first.sum())
    sums = {name: np.bincount(pair, counts[name].to_numpy(), pairs) for name in COUNTS.names[4:]}
    if not logged:
        query = (np.cumsum(begins(counts["query_id"])) - 1)[first]
        clicks, views = sums["clicks"], np.bincount(query, sums["clicks"])[query] if pairs else sums["clicks"]
        pair, position = np.arange(pairs), np.zeros(pairs, int)
    seen = np.maximum(views, _TINY)  # a purchase may be all that is known of a pair
    place = np.bincount(pair, seen * position, pairs) / np.bincount(pair, seen, pairs)
    return _Events(pair, position, clicks, views, np.floor(place + 0.5).astype(int), sums, first)


def _looked(events: _Events, examined: np.ndarray, rate: float) -> np.ndarray:
    """Return how many of each row's views are likely to have been looked at, if its item is clicked at that rate."""
    unclicked = examined * (1 - rate) / (1 - examined * rate)
    return events.clicks + (events.views - events.clicks) * unclicked[events.position]


def _examined(events: _Events, looks: np.ndarray, guess: np.ndarray) -> np.ndarray:
    views = np.bincount(events.position, events.views, len(guess))
    share = (np.bincount(events.position, looks, len(guess)) + _PRIOR_VIEWS * guess) / (views + _PRIOR_VIEWS)
    return share / share.max(initial=_TINY)


def _standing(events: _Events, wanted: np.ndarray, positions: int) -> np.ndarray:
    share = np.clip(wanted.mean(), 1e-4, 1 - 1e-4) if len(wanted) else 0.5
    found = np.bincount(events.place, wanted, positions) + _PRIOR_PLACED * share
    rest = np.bincount(events.place, 1 - wanted, positions) + _PRIOR_PLACED * (1 - share)
    return np.log(found / rest) - np.log(share / (1 - share))


def _behaviour(events: _Events, weight: np.ndarray, looks: np.ndarray, prior: float) -> Behaviour:
    """Return the behaviour of pairs by how much they count, [pairs]; `looks` [rows]."""
    # Not by products of BLAS, whose threads add in any order.
    total = {name: float((weight * values).sum()) for name, values in events.sums.items()}
    dwells = max(total["dwells"], _TINY)
    mean = total["log_dwell"] / dwells
    deviation = np.sqrt(max(total["log_dwell_squared"] / dwells - mean**2, 1e-2))
    bought = (weight * _purchases(events)).sum() / max(total["clicks"], _TINY)
    rate = (total["clicks"] + prior) / ((weight[events.pair] * looks).sum() + _PRIOR_LOOKS)
    return Behaviour(_chance(rate), mean, float(deviation), _chance(bought))


def _chance(value: float) -> float:
    """Keep a probability away from what no number of events could prove."""
    return float(np.clip(value, 1e-4, 0.95))


def _evidence(events: _Events, model: ClickModel) -> np.ndarray:
    return _log_likelihood(events, model.wanted, model.examined) - _log_likelihood(
        events, model.unwanted, model.examined
    )


def _log_likelihood(events: _Events, behaviour: Behaviour, examined: np.ndarray) -> np.ndarray:
    """Clicks are binomial in the views, dwell times log-normal, purchases binomial in the clicks, [pairs].

    Up to what is the same for both behaviours.
    """
    clicks, dwells = events.sums["clicks"], events.sums["dwells"]
    passed_over = (events.views - events.clicks) * np.log1p(-examined * behaviour.rate)[events.position]
    total = clicks * np.log(behaviour.rate) + np.bincount(events.pair, passed_over, len(clicks))
    mean, deviation = behaviour.dwell_mean, behaviour.dwell_deviation
    squares = events.sums["log_dwell_squared"] - 2 * mean * events.sums["log_dwell"] + dwells * mean**2
    total -= dwells * np.log(deviation) + squares / (2 * deviation**2)
    bought = _purchases(events)
    return total + bought * np.log(behaviour.bought) + (clicks - bought) * np.log1p(-behaviour.bought)


def _purchases(events: _Events) -> np.ndarray:
    """Return of how many clicks something came, [pairs]: what is put into the cart and then bought is one."""
    return np.minimum(np.maximum(events.sums["carts"], events.sums["purchases"]), events.sums["clicks"])
