"""Which items are one thing: what the photos that were shown both say of a pair, and what titles say.

Pure functions over Arrow tables.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import NamedTuple

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


def title_similarity(items: pa.Table, common: int, besides: pa.Table | None = None, most: int = 256) -> pa.Table:
    """Return left, right (left < right), similarity: the cosine of two titles' words, rare ones counting more (TF-IDF).

    Only pairs that share a word, and of them those that are as much alike as one's `most` most alike, and the pairs
    (left, right) of `besides`; words of more than `common` titles do not count.
    """
    item_ids = pc.unique(items["item_id"]).cast(pa.string())
    item_ids = item_ids.take(pc.sort_indices(item_ids))
    codes = pc.index_in(pc.cast(items["item_id"], pa.string()), item_ids).to_numpy()
    words = _weigh_words(codes, items["title"].to_pylist(), common)
    asked = np.zeros(0, np.int64)
    if besides is not None and len(item_ids):
        ends = [pc.index_in(pc.cast(besides[name], pa.string()), item_ids) for name in PAIR]
        left, right = (pc.fill_null(each, -1).to_numpy().astype(np.int64) for each in ends)
        asked = np.sort((left * len(item_ids) + right)[(left >= 0) & (right >= 0)])
    first = np.flatnonzero(np.diff(words.item, prepend=-1))
    starts = first[np.diff(first // _WORDS_TOGETHER, prepend=-1) != 0]
    slices = [slice(start, end) for start, end in pairwise([*starts, len(words.item)])]
    parts = [_alike(words, part, len(item_ids), asked, most) for part in slices]
    schema = pa.schema([("left", pa.int64()), ("right", pa.int64()), ("similarity", pa.float64())])
    pairs = pa.concat_tables([schema.empty_table(), *parts]).group_by(list(PAIR)).aggregate([("similarity", "max")])
    names = [item_ids.take(pairs[name]) for name in PAIR]
    return pa.table([*names, pc.min_element_wise(pairs["similarity_max"], 1.0)], names=[*PAIR, "similarity"])


class _Words(NamedTuple):
    """Rows of items and words, item by item: what the word is of the length of the item's title. Of each word, where
    its rows begin in `rows`, which has those of equal words together."""

    item: np.ndarray
    word: np.ndarray
    weight: np.ndarray
    rows: np.ndarray
    begins: np.ndarray


def _weigh_words(codes: np.ndarray, titles: list[str | None], common: int) -> _Words:
    numbers: dict[str, int] = {}
    pairs = [
        (item, numbers.setdefault(word, len(numbers)))
        for item, title in zip(codes.tolist(), titles, strict=True)
        for word in set(_WORD.findall((title or "").lower()))
    ]
    item, word = np.array(sorted(pairs), np.int64).reshape(-1, 2).T
    frequency = np.bincount(word)
    told = frequency[word] <= common
    item, word = item[told], word[told]
    rarity = np.log(max(len(codes), 1) / frequency[word]) + 1e-3
    begins_at = np.concatenate([[0], np.cumsum(np.bincount(word, minlength=len(numbers)))])
    length = np.sqrt(np.bincount(item, rarity**2))
    return _Words(item, word, rarity / length[item], np.argsort(word, kind="stable"), begins_at)


def _alike(words: _Words, part: slice, items: int, asked: np.ndarray, most: int) -> pa.Table:
    """Return left, right and similarity of pairs of the items in `part` of the rows with any items.

    asked: pairs that are wanted in any case, left * items + right, in order.
    """
    begin = words.begins[words.word[part]]
    count = words.begins[words.word[part] + 1] - begin
    place = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count - begin, count)
    other = words.rows[place]
    both = pa.table(
        {
            "item": np.repeat(words.item[part], count),
            "other": words.item[other],
            "product": np.repeat(words.weight[part], count) * words.weight[other],
        }
    )
    both = both.filter(pc.not_equal(both["item"], both["other"]))
    found = both.group_by(["item", "other"]).aggregate([("product", "sum")])
    # Threads sum in any order: the last bits must not break ties.
    found = found.set_column(2, "similarity", pc.round(found["product_sum"], 9))
    found = found.sort_by([("item", "ascending"), ("similarity", "descending")])
    item, other, similarity = (found[name].to_numpy() for name in ("item", "other", "similarity"))
    first = np.flatnonzero(np.diff(item, prepend=-1))
    count = np.diff(first, append=len(item))
    least = np.repeat(similarity[first + np.minimum(count, most) - 1], count)  # equals are kept or left together
    left, right = np.minimum(item, other), np.maximum(item, other)
    kept = (similarity >= least) | _is_in(left * items + right, asked)
    return pa.table([left[kept], right[kept], similarity[kept]], names=[*PAIR, "similarity"])


def _is_in(values: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    place = np.searchsorted(ordered, values)
    return np.append(ordered, -1)[place] == values


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
