"""Organise behaviour logs into classes: things that people search for, with photos and items as equal samples.

Pure functions over Arrow tables. A click says little: people click what stands on top, and click wrong things a third
of the time. So clicks become *evidence* (`mixer.clicks`), items that the same photos want become a class, titles help
as far as behaviour shows that they tell things apart, and each photo keeps what the logs say for and against each
class: training weighs it with what the picture looks like.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field

from mixer.clicks import COUNTS, ClickModel, begins, evidence, fit_click_model
from mixer.item_pairs import PAIR, same_thing_evidence, title_similarity, titles_worth
from mixer.multicut import greedy_multicut

_SURE_SHOWN = 0.99
_TINY = 1e-12


class LabelingConfig(BaseModel):
    """How logs become classes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    robot_clicks: int = Field(6, ge=2, description="a session with this many clicks is a robot's")
    candidates: int = Field(
        32, ge=1, description="classes that a photo keeps evidence of, first those that are likelier than one not shown"
    )
    trust: float = Field(30.0, gt=0, description="nats that behaviour may say at most of one pair of items")
    titles: bool = Field(True, description="let items' titles speak too, as far as behaviour shows that they tell")
    common_words: int = Field(1000, ge=1, description="words in more titles than this tell nothing")
    largest_class: int = Field(1000, ge=1, description="items in a class at most")


@dataclass(frozen=True)
class Labels:
    """Classes of items, and what the logs say of photos.

    items: item_id, class_id. queries, those with a click: query_id, class_id (the likeliest), confidence (its
    probability), candidates (list of class_id), evidence (list, nats for each candidate: ln P(events | the photo shows
    it) - ln P(events | it does not)), unseen (nats of every other class: negative, for an engine that is any good shows
    what is in the photo). model: the click model that was fitted.
    """

    items: pa.Table
    queries: pa.Table
    model: ClickModel


def organise(counts: pa.Table, items: pa.Table, config: LabelingConfig) -> Labels:
    """Turn counts into classes.

    Args:
        counts: of COUNTS' columns, one row a query, item and position.
        items: item_id and title (or null) of every item, also of those nobody clicked: each is a class of its own
            unless joined.
    """
    # In one order whatever order the rows came in: sums are then the same to the bit, and ties fall alike.
    order = [(name, "ascending") for name in ("query_id", "item_id", "position")]
    counts = with_lost_clicks(counts.select(COUNTS.names).cast(COUNTS)).sort_by(order)
    model = fit_click_model(counts)
    pairs = evidence(counts, model)
    together = same_thing_evidence(pairs, model.share, config.trust)
    alike = title_similarity(items, config.common_words, together) if config.titles else together.slice(0, 0)
    classes = cluster_items(together, alike.rename_columns([*PAIR, "similarity"]), items["item_id"], config)
    clicked = pairs["query_id"].filter(pc.greater(pairs["clicks"], 0)).unique()
    asked = pairs.filter(pc.is_in(pairs["query_id"], clicked))
    return Labels(classes, photo_evidence(asked, classes, config.candidates), model)


def with_lost_clicks(counts: pa.Table) -> pa.Table:
    """Return COUNTS with as many clicks as there must have been: a shop may log what is bought, and lose clicks.

    A cart and its purchase take one click.
    """
    clicks = pc.max_element_wise(counts["clicks"], counts["carts"], counts["purchases"])
    return counts.set_column(counts.column_names.index("clicks"), "clicks", clicks)


def cluster_items(
    behaviour: pa.Table, similarity: pa.Table, item_ids: pa.ChunkedArray, config: LabelingConfig
) -> pa.Table:
    """Return item_id, class_id, numbered by their smallest item.

    Args:
        behaviour: left, right, evidence, as `same_thing_evidence` returns it.
        similarity: left, right, similarity, as `title_similarity` returns it; may be empty.
        item_ids: every item; pairs of others are left out.
    """
    known = item_ids.unique()
    edges = behaviour.join(similarity, PAIR, join_type="full outer")
    edges = edges.filter(pc.and_(pc.is_in(edges["left"], known), pc.is_in(edges["right"], known)))
    edges = edges.sort_by([(name, "ascending") for name in PAIR])
    said = pc.fill_null(edges["evidence"], 0.0).to_numpy()
    alike = pc.fill_null(edges["similarity"], 0.0).to_numpy()
    before, worth = titles_worth(said, alike)
    odds = np.round(said + worth * alike, 9)  # threads sum in any order: the last bits must not break ties
    rows = zip(edges["left"].to_pylist(), edges["right"].to_pylist(), odds.tolist(), strict=True)
    clusters = greedy_multicut(known.to_pylist(), rows, before, config.largest_class)
    return pa.table(
        {
            "item_id": pa.array([item for cluster in clusters for item in cluster], pa.string()),
            "class_id": pa.array([label for label, cluster in enumerate(clusters) for _ in cluster], pa.int64()),
        }
    )


def photo_evidence(pairs: pa.Table, items: pa.Table, candidates: int) -> pa.Table:
    """Return `Labels.queries` of all photos that occur in pairs (query_id, item_id, evidence, standing).

    Each item of a class was clicked or passed over by itself, so their evidence adds up. Where an engine puts them
    comes of one likeness, right or wrong, so their standing speaks once: its mean.
    """
    by_class = pairs.join(items, "item_id", join_type="inner").group_by(["query_id", "class_id"])
    summed = by_class.aggregate([("evidence", "sum"), ("standing", "mean")])
    values = pc.add(summed["evidence_sum"], summed["standing_mean"])
    values = pc.round(values, 9)  # threads sum in any order: the last bits must not break ties
    table = pa.table([summed["query_id"], summed["class_id"], values], names=["query_id", "class_id", "evidence"])
    best = pc.max(items["class_id"]).as_py() if len(items) else None
    classes = 0 if best is None else best + 1

    table = table.sort_by([("query_id", "ascending"), ("evidence", "descending"), ("class_id", "ascending")])
    first = begins(table["query_id"])
    label, highest = (table.filter(pa.array(first))[name].to_numpy() for name in ("class_id", "evidence"))
    starts, photo = np.flatnonzero(first), np.cumsum(first) - 1
    shown = np.diff(starts, append=len(table))
    total = np.bincount(photo, np.exp(table["evidence"].to_numpy() - highest[photo]), len(starts))
    unseen = odds_unseen(np.log(np.maximum(total, 1.0)) + highest, shown, classes)
    rest = np.log(np.maximum(classes - shown, _TINY)) + unseen
    confidence = np.exp(-np.logaddexp(np.log(np.maximum(total, 1.0)), rest - highest))

    above = table["evidence"].to_numpy() - unseen[photo]
    table = table.append_column("against", pa.array(above <= 0)).append_column("strength", pa.array(np.abs(above)))
    order = [("query_id", "ascending"), ("against", "ascending"), ("strength", "descending"), ("class_id", "ascending")]
    table = table.sort_by(order)
    rank = np.arange(len(table)) - np.repeat(starts, shown)
    kept = table.filter(pa.array(rank < candidates))
    offsets = pa.array(np.concatenate([[0], np.cumsum(np.minimum(shown, candidates))]), pa.int32())
    return pa.table(
        {
            "query_id": table["query_id"].take(pa.array(starts)),
            "class_id": pa.array(label, pa.int64()),
            "confidence": pa.array(confidence, pa.float32()),
            "candidates": pa.ListArray.from_arrays(offsets, kept["class_id"].combine_chunks()),
            "evidence": pa.ListArray.from_arrays(offsets, pc.cast(kept["evidence"], pa.float32()).combine_chunks()),
            "unseen": pa.array(unseen, pa.float32()),
        }
    )


def odds_unseen(said: np.ndarray, shown: np.ndarray, classes: int) -> np.ndarray:
    """Return, for each photo, the log-odds of a class of which nothing was shown against one that was, before clicks.

    How often the thing in the photo is among what is shown is estimated by EM, and held below `_SURE_SHOWN`.

    Args:
        said: log of the sum of exponentials of the evidence of the classes shown, [photos].
        shown: number of classes shown, [photos].
        classes: number of all classes.
    """
    share = 0.5
    for _ in range(50):
        odds = said - np.log(np.maximum(shown, 1)) + np.log(share) - np.log1p(-share)
        among = 1 / (1 + np.exp(-np.clip(odds, -50, 50)))
        share = float(np.clip(among.mean() if len(among) else share, 1 - _SURE_SHOWN, _SURE_SHOWN))
    each, other = share / np.maximum(shown, 1), (1 - share) / np.maximum(classes - shown, 1)
    return np.minimum(np.log(other) - np.log(each), 0.0)
