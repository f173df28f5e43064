"""Which items are one thing: what the photos that were shown both say of a pair, and what titles say.

Pure functions over Arrow tables.
"""

from __future__ import annotations

import re
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mixer.clicks import begins

PAIR = ("left", "right")  # left < right
_ROWS_TOGETHER, _WORDS_TOGETHER = 50_000, 5_000  # rows of photos and items, of items and words, that are joined at once
_MOST_PAIRS = 1_000_000  # of items, that teach what titles are worth
_EM_ROUNDS = 200
_WORD = re.compile(r"\w+")


def same_thing_evidence(pairs: pa.Table, share: float, trust: float) -> pa.Table:
    """Return left, right (left < right), evidence: ln P(events | one thing) - ln P(events | two things), in nats.

    A photo wants both of two items that are one thing, or neither; of two things it wants one at most. Only photos to
    which both were shown speak, so that items are not apart because the engine showed them apart.

    Args:
        pairs: query_id, item_id, evidence, all rows of a photo together.
        share: how likely an item that is shown is wanted.
        trust: evidence is cut to -trust ... trust, for the model's errors grow with the number of events.
    """
    item_ids = pc.unique(pairs["item_id"])
    item_ids = item_ids.take(pc.sort_indices(item_ids))
    coded = pa.table(
        {
            "photo": pa.array(np.cumsum(begins(pairs["query_id"]))),
            "item": pc.index_in(pairs["item_id"], item_ids),  # numbered in the order of the ids
            "evidence": pairs["evidence"],
        }
    )
    parts = [_same_thing(part, share) for part in _some_at_a_time(coded, "photo", _ROWS_TOGETHER)]
    summed = _summed(pa.concat_tables(parts), -trust, trust)
    for at, name in enumerate(PAIR):
        summed = summed.set_column(at, name, item_ids.take(summed[name]))
    return summed


def _same_thing(pairs: pa.Table, share: float) -> pa.Table:
    """Return left, right, evidence of photo, item, evidence; the pairs of all that a photo was shown must be there."""
    share = min(share, 0.4)
    wanted = pairs.filter(pc.greater(pairs["evidence"], 0))  # where neither is wanted, nothing is said
    both = wanted.join(pairs, "photo", join_type="inner", right_suffix="_right")
    one, other = both["item"], both["item_right"]
    # A pair of which both are wanted comes twice: keep one.
    once = pc.or_(pc.less(one, other), pc.and_(pc.not_equal(one, other), pc.less_equal(both["evidence_right"], 0)))
    both = both.filter(once)
    a, b = both["evidence"].to_numpy(), both["evidence_right"].to_numpy()
    together = np.logaddexp(np.log(share) + a + b, np.log1p(-share))
    apart = np.logaddexp(np.logaddexp(np.log(share) + a, np.log(share) + b), np.log1p(-2 * share))
    one, other = both["item"], both["item_right"]
    table = pa.table(
        {
            "left": pc.min_element_wise(one, other),
            "right": pc.max_element_wise(one, other),
            "evidence": pa.array(together - apart),
        }
    )
    return _summed(table, -np.inf, np.inf)


def title_similarity(items: pa.Table, common: int, most: int = 256) -> pa.Table:
    """Return left, right (left < right), similarity: the cosine of two titles' words, rare ones counting more (TF-IDF).

    Only pairs that share a word, and of them the `most` of each item that are most alike; words of more than `common`
    titles do not count.
    """
    item_ids = pc.unique(items["item_id"]).cast(pa.string())
    item_ids = item_ids.take(pc.sort_indices(item_ids))
    table = _weighted_words(pc.index_in(pc.cast(items["item_id"], pa.string()), item_ids), items["title"], common)
    parts = [_most_alike(part, table, most) for part in _some_at_a_time(table, "item", _WORDS_TOGETHER)]
    pairs = pa.concat_tables(parts).group_by(list(PAIR)).aggregate([("similarity", "max")])  # of either side's
    names = [item_ids.take(pairs[name]) for name in PAIR]
    return pa.table([*names, pc.min_element_wise(pairs["similarity_max"], 1.0)], names=[*PAIR, "similarity"])


def _weighted_words(items: pa.ChunkedArray, titles: pa.ChunkedArray, common: int) -> pa.Table:
    """Return item and word, both numbers, and the word's share in the length of the item's title, item by item."""
    numbers: dict[str, int] = {}
    rows = [
        (item, numbers.setdefault(word, len(numbers)))
        for item, title in zip(items.to_pylist(), titles.to_pylist(), strict=True)
        for word in set(_WORD.findall((title or "").lower()))
    ]
    item, word = np.array(sorted(rows), np.int64).reshape(-1, 2).T
    frequency = np.bincount(word)
    told = frequency[word] <= common
    item, word = item[told], word[told]
    rarity = np.log(max(len(items), 1) / frequency[word]) + 1e-3
    return pa.table({"item": item, "word": word, "weight": rarity / np.sqrt(np.bincount(item, rarity**2)[item])})


def _most_alike(part: pa.Table, table: pa.Table, most: int) -> pa.Table:
    """Return left, right and similarity of the items in `part` and, of all in `table`, the `most` most like each."""
    both = part.join(table, "word", join_type="inner", right_suffix="_right")
    both = both.filter(pc.not_equal(both["item"], both["item_right"]))
    both = both.append_column("product", pc.multiply(both["weight"], both["weight_right"]))
    found = both.group_by(["item", "item_right"]).aggregate([("product", "sum")])
    similarity = pc.round(found["product_sum"], 9)  # threads sum in any order: the last bits must not break ties
    found = pa.table([found["item"], found["item_right"], similarity], names=["item", "other", "similarity"])
    found = found.sort_by([("item", "ascending"), ("similarity", "descending"), ("other", "ascending")])
    first = np.flatnonzero(begins(found["item"]))
    rank = np.arange(len(found)) - np.repeat(first, np.diff(first, append=len(found)))
    found = found.filter(pa.array(rank < most))
    one, other = found["item"], found["other"]
    ends = [pc.min_element_wise(one, other), pc.max_element_wise(one, other)]
    return pa.table([*ends, found["similarity"]], names=[*PAIR, "similarity"])


def titles_worth(behaviour: np.ndarray, similarity: np.ndarray) -> tuple[float, float]:
    """Return the log-odds that two items are one thing before anything is known, and what a similarity of 1 adds.

    Learned, by logistic regression, from the pairs of which behaviour says anything, each as much one thing as its
    behaviour and its titles make it (EM): titles that do not tell things apart are worth nothing, and where little is
    sure, little is learned.
    """
    said = np.flatnonzero(behaviour)
    said = said[:: -(-len(said) // _MOST_PAIRS) or 1]
    # Two imagined pairs of each kind keep the fit finite.
    imagined, alike = np.array([0.0, 0.0, 1.0, 0.0]), np.array([0.0, 0.0, 0.5, 0.5])
    features = np.stack([np.ones(len(said) + 4), np.concatenate([similarity[said], alike])], axis=1)
    fitted = np.array([-3.0, 0.0])
    for _ in range(_EM_ROUNDS):
        odds = features @ fitted
        chance = _logistic(odds)
        same = np.concatenate([_logistic(odds[:-4] + behaviour[said]), imagined])
        slope = features.T @ (same - chance)
        curvature = (features * (chance * (1 - chance))[:, None]).T @ features + 1e-3 * np.eye(2)
        step = np.clip(np.linalg.solve(curvature, slope), -2, 2)
        fitted = fitted + step
        if np.abs(step).max() < 1e-4:
            break
    before, worth = fitted
    if worth <= 0:
        share = same.mean()
        before, worth = np.log(share / (1 - share)), 0.0
    return float(min(before, 0.0)), float(worth)


def _logistic(odds: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(odds, -30, 30)))


def _some_at_a_time(table: pa.Table, key: str, count: int) -> list[pa.Table]:
    """Cut a table into slices of about `count` rows, those with the same key, which lie together, in one; at least one.

    What a join makes of a slice is many times as much.
    """
    first = np.flatnonzero(begins(table[key]))
    starts = first[np.diff(first // count, prepend=-1) != 0]
    return [table.slice(start, end - start) for start, end in pairwise([*starts, len(table)])] or [table]


def _summed(pairs: pa.Table, least: float, most: float) -> pa.Table:
    sums = pairs.group_by(list(PAIR)).aggregate([("evidence", "sum")])
    clipped = pc.min_element_wise(pc.max_element_wise(sums["evidence_sum"], least), most)
    return sums.select(list(PAIR)).append_column("evidence", clipped)
