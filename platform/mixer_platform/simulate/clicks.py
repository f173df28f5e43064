"""A position-based click model over an incumbent engine's result pages: logs for any catalogue, in numpy.

The engine ranks items by a noisy similarity. A person examines the item at a position with a chance that depends on the
position alone, and clicks what was examined with a chance that depends on the item alone (Craswell et al., "An
experimental comparison of click position-bias models", WSDM 2008).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mixer_platform.schema import EVENTS, LOGS
from mixer_platform.simulate.config import ClickConfig
from mixer_platform.simulate.faults import break_rows

OTHER, RELATED, RIGHT = 0, 1, 2  # grades of an item for a query
START_MS = 1_735_689_600_000  # 2025-01-01 00:00 UTC
WEEK_MS = 7 * 24 * 3_600_000

Array = NDArray[Any]


class Pool(NamedTuple):
    """The engine's candidates, [queries, pool] each: item index, score (-inf: never shown), grade."""

    item: Array
    score: Array
    grade: Array


class Pages(NamedTuple):
    """Result pages: query and session of each [pages], whether a bot's, when; items and grades [pages, page_size].

    `seen` [pages, page_size] says which of the items came on screen, `clicked` which of them were clicked.
    """

    query: Array
    session: Array
    bot: Array
    start_ms: Array
    item: Array
    grade: Array
    seen: Array
    clicked: Array


def zipf(count: int, ratio: float) -> Array:
    """Demand for `count` things by Zipf's law, float64 [count], sum 1: the first is wanted `ratio` times the last."""
    exponent = np.log(ratio) / np.log(count) if count > 1 else 0.0
    weights = np.arange(1, count + 1, dtype=np.float64) ** -exponent
    return np.asarray(weights / weights.sum())


def simulate_logs(
    query_ids: Sequence[str],
    item_ids: Sequence[str],
    similarity: Array,
    grade: Array,
    demand: Array,
    config: ClickConfig,
    seed: int,
) -> tuple[pa.Table, dict[str, Any]]:
    """Draw behaviour logs. Everything follows from the arguments: the same seed gives the same rows.

    Args:
        similarity: float [queries, items], what the engine takes for likeness, in any unit.
        grade: int [queries, items], RIGHT, RELATED or OTHER. A query may have several right items, or none.
        demand: float [queries], how often each query is asked; any positive scale.

    Returns:
        The logs by time (repeated rows last) in the types of `schema.LOGS`, and what was measured on them whole.
    """
    rng = np.random.default_rng([seed, 1])
    pool = retrieve(similarity, grade, config, rng)
    pages, click_chances = browse(pool, demand, config, rng)
    logs = _events(pages, query_ids, item_ids, config, rng)
    logs, faults = break_rows(logs, config.fault_rate, rng)
    report = {"click_chance": click_chances, **_measure(pages, len(query_ids)), "broken_rows": faults}
    report["events"] = logs.num_rows
    return logs, report


def retrieve(similarity: Array, grade: Array, config: ClickConfig, rng: np.random.Generator) -> Pool:
    """The incumbent engine: rank by similarity and noise, then move right items to ranks that it would reach.

    A photo's ranking stays the same from page to page but for `page_noise`, so what the engine gets wrong for a photo
    it gets wrong again and again, as engines do.
    """
    noise = rng.standard_normal(similarity.shape, dtype=np.float32)
    score = similarity / max(float(similarity.std()), 1e-9) + config.engine_noise * noise
    right = grade == RIGHT
    wrong = np.sort(np.where(right, -np.inf, score), axis=1)[:, ::-1]
    query, item = np.nonzero(right)
    rank = np.minimum(rng.geometric(config.engine_precision, len(query)), (~right).sum(1)[query]) - 1
    known = rng.random(len(query)) < config.engine_recall
    above = np.column_stack([wrong[:, 0] + 1, wrong[:, :-1]])
    score[query, item] = np.where(known, (above + wrong)[query, rank] / 2, -np.inf)  # half-way between neighbours
    best = np.argsort(-score, axis=1)[:, : config.pool_size]
    return Pool(best, np.take_along_axis(score, best, 1), np.take_along_axis(grade, best, 1))


def browse(pool: Pool, demand: Array, config: ClickConfig, rng: np.random.Generator) -> tuple[Pages, dict[str, float]]:
    """Let people and bots ask, look and click. Returns the pages and the click chances of an examined item by grade."""
    share = demand / demand.sum()
    # A photo is in the logs because somebody asked with it, so each is asked at least once.
    visits = np.maximum(rng.multinomial(round(len(share) * config.sessions_per_query), share), 1)
    people = int(visits.sum())
    bots = round(people * config.bot_share)
    query = np.concatenate(
        [np.repeat(np.arange(len(share)), visits), rng.choice(len(share), bots * config.bot_pages, p=share)]
    )
    session = np.concatenate([np.arange(people), people + np.repeat(np.arange(bots), config.bot_pages)])
    bot = session >= people
    page_number = np.concatenate([np.zeros(people, int), np.tile(np.arange(config.bot_pages), bots)])
    starts = np.sort(rng.integers(START_MS, START_MS + config.weeks * WEEK_MS, people + bots))
    session = rng.permutation(people + bots)[session]  # a session's number is its place in time
    start_ms = starts[session] + 10_000 * page_number

    score = pool.score[query] + config.page_noise * rng.standard_normal((len(query), pool.score.shape[1]))
    order = np.argsort(-score, axis=1)[:, : config.page_size]
    item, grade = (np.take_along_axis(column[query], order, 1) for column in (pool.item, pool.grade))
    position = np.arange(item.shape[1])
    scrolled = rng.random((len(query), -(-len(position) // config.screen_size) - 1)) < config.scroll
    screens = 1 + np.cumprod(scrolled, axis=1).sum(1) + bot * len(position)  # a bot reads the whole page
    shown = np.isfinite(np.take_along_axis(score, order, 1))
    seen = shown & (position < config.screen_size * screens[:, None])

    examination = (1.0 + position) ** -config.examination_exponent
    attention = seen * examination * ~bot[:, None]
    examined = [float(attention[grade == kind].sum()) for kind in (OTHER, RELATED, RIGHT)]
    chance = click_chances(examined, config)
    click = np.where(bot[:, None], config.bot_click, examination * chance[grade])
    clicked = seen & (rng.random(seen.shape) < click)
    pages = Pages(query, session, bot, start_ms, item, grade, seen, clicked)
    return pages, dict(zip(("other", "related", "right"), chance.round(4).tolist(), strict=True))


def click_chances(examined: Sequence[float], config: ClickConfig) -> Array:
    """Chance of a click on an examined item by grade, float64 [3], for `click_noise` of the clicks on wrong items.

    `examined` [3] tells how many items of each grade people are expected to examine on all pages.
    """
    other, related, right = examined
    appeal = np.array([1.0, config.related_appeal])
    wrong = float(appeal @ [other, related])
    odds = config.click_noise / (1 - config.click_noise) * right / wrong if wrong else 0.0
    relative = np.append(odds * appeal, 1.0)
    return np.asarray(config.click_probability * relative / relative.max())


def _events(
    pages: Pages, query_ids: Sequence[str], item_ids: Sequence[str], config: ClickConfig, rng: np.random.Generator
) -> pa.Table:
    """One row for each impression, click, cart and purchase, by time."""
    right = pages.grade == RIGHT
    median = np.where(right, config.dwell_right_ms, config.dwell_wrong_ms)
    median = np.where(pages.bot[:, None], 300.0, median)
    dwell = median * np.exp(config.dwell_sigma * rng.standard_normal(right.shape))
    cart_chance = np.where(right, config.cart_right, config.cart_wrong) * ~pages.bot[:, None]
    cart = pages.clicked & (rng.random(right.shape) < cart_chance)
    bought = cart & (rng.random(right.shape) < config.purchase_given_cart)

    impression_ms = pages.start_ms[:, None] + 700 * np.arange(right.shape[1])
    click_ms = impression_ms + 500 + rng.exponential(3000, right.shape)
    cart_ms = click_ms + dwell
    moments = (impression_ms, click_ms, cart_ms, cart_ms + rng.exponential(120_000, right.shape))

    cells = [np.nonzero(happened) for happened in (pages.seen, pages.clicked, cart, bought)]
    page = np.concatenate([cell[0] for cell in cells])
    position = np.concatenate([cell[1] for cell in cells])
    kind = np.repeat(np.arange(len(EVENTS)), [len(cell[0]) for cell in cells])
    time = np.concatenate([moment[cell] for moment, cell in zip(moments, cells, strict=True)]).astype(np.int64)
    order = np.argsort(time, kind="stable")
    page, position, kind, time = page[order], position[order], kind[order], time[order]
    columns = {
        "event_id": [f"e{number:09d}" for number in range(len(order))],
        "timestamp_ms": time,
        "session_id": [f"s{number:08d}" for number in pages.session[page]],
        "query_id": pa.array(query_ids).take(pages.query[page]),
        "item_id": pa.array(item_ids).take(pages.item[page, position]),
        "position": position,
        "event": pa.array(EVENTS).take(kind),
        "dwell_ms": pa.array(dwell[page, position].astype(np.int64), mask=kind != EVENTS.index("click")),
    }
    return pa.table([pa.array(columns[f.name]).cast(f.type) for f in LOGS.columns], schema=LOGS.columns)


def _measure(pages: Pages, queries: int) -> dict[str, Any]:
    """Counts and rates of the pages as they are, unbroken."""
    wrong = pages.grade != RIGHT
    people = pages.clicked & ~pages.bot[:, None]
    query = np.broadcast_to(pages.query[:, None], wrong.shape)
    pairs = np.unique(np.stack([query, pages.item, wrong])[:, pages.clicked], axis=1)
    seen, clicked = pages.seen[~pages.bot].sum(0), people.sum(0)
    asked = np.bincount(pages.query[~pages.bot], minlength=queries)
    return {
        "sessions": int(pages.session.max() + 1),
        "sessions_per_query": {"mean": float(asked.mean()), "min": int(asked.min()), "max": int(asked.max())},
        "impressions": int(pages.seen.sum()),
        "clicks": int(pages.clicked.sum()),
        "clicks_of_bots": int(pages.clicked.sum() - people.sum()),
        "clicks_on_wrong_items": _share(wrong[pages.clicked]),
        "clicks_on_wrong_items_by_people": _share(wrong[people]),
        "clicked_pairs_wrong": _share(pairs[2]),
        "queries_with_a_right_click": round(len(np.unique(query[people & ~wrong])) / queries, 4),
        "pages_with_a_right_item_on_screen": _share((pages.seen & ~wrong)[~pages.bot].any(1)),
        "clicks_per_impression_by_position": (clicked / np.maximum(seen, 1)).round(4).tolist(),
    }


def _share(mask: Array) -> float:
    return round(float(mask.mean()), 4) if mask.size else 0.0
