"""Organise behaviour logs into classes: things that people search for, with photos and items as equal samples.

Pure functions over Arrow tables. A click says little: people click what stands on top, and click wrong things a third
of the time. So clicks become *affinity* (how attractive an item is to a photo, had it been looked at), items wanted by
the same photos become a class, and each photo joins the class that holds most of its affinity.
"""

from __future__ import annotations

from dataclasses import dataclass

import networkx as nx
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field


class LabelingConfig(BaseModel):
    """How logs become classes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    robot_clicks: int = Field(6, ge=2, description="a session with this many clicks is a robot's")
    em_rounds: int = Field(30, ge=1, description="rounds of the position model's EM")
    prior_clicks: float = Field(0.2, gt=0, description="imagined clicks on every pair, so that few views say little")
    prior_views: float = Field(2.0, gt=0, description="imagined views of every pair")
    purchase_bonus: float = Field(0.5, ge=0, description="affinity added by a purchase, halved as often as it repeats")
    candidates: int = Field(12, ge=1, description="items a photo votes for, best affinity first")
    min_similarity: float = Field(0.2, ge=0, le=1, description="cosine of two items' photos to be joined at all")
    support: float = Field(2.0, ge=0, description="imagined photos of every item that want nothing else")
    resolution: float = Field(4.0, gt=0, description="Louvain resolution; higher makes smaller classes")
    min_confidence: float = Field(0.0, ge=0, le=1, description="photos below it are not learned from")
    seed: int = 0


COUNTS = pa.schema(
    [
        ("query_id", pa.string()),
        ("item_id", pa.string()),
        ("position", pa.int32()),
        ("impressions", pa.int64()),
        ("clicks", pa.int64()),
        ("purchases", pa.int64()),
    ]
)


@dataclass(frozen=True)
class Labels:
    """Classes of items and photos.

    items: item_id, class_id. queries: query_id, class_id, confidence (share of the photo's affinity inside its class).
    examination: probability that a position is looked at, relative to the first, [positions].
    """

    items: pa.Table
    queries: pa.Table
    examination: np.ndarray


def organise(counts: pa.Table, item_ids: pa.Array, config: LabelingConfig) -> Labels:
    """Turn counts into classes.

    Args:
        counts: of COUNTS' columns, one row a query, item and position; purchases have carts counted in.
        item_ids: every item, also those nobody clicked: each is a class of its own unless joined.
    """
    pairs, examination = attraction(counts.select(COUNTS.names).cast(COUNTS), config)
    pairs = best_candidates(affinity(pairs, config), config.candidates)
    items = cluster_items(item_similarity(pairs, config.min_similarity, config.support), item_ids, config)
    return Labels(items, assign_queries(pairs, items, config.min_confidence), examination)


def attraction(counts: pa.Table, config: LabelingConfig) -> tuple[pa.Table, np.ndarray]:
    """Fit the position-based click model by EM: P(click) = examined(position) * attractive(query, item).

    Returns pairs (query_id, item_id, attraction, purchases) and the examination curve. The model is that of Craswell
    et al., "An experimental comparison of click position-bias models", WSDM 2008.
    """
    # In one order whatever order the rows came in: sums are then the same to the bit, and ties fall alike.
    counts = counts.sort_by([(name, "ascending") for name in ("query_id", "item_id", "position")])
    begins = _begins(counts["query_id"]) | _begins(counts["item_id"])
    pair = np.cumsum(begins) - 1
    pairs = counts.select(["query_id", "item_id"]).filter(pa.array(begins))
    position = counts["position"].to_numpy()
    clicks = counts["clicks"].to_numpy().astype(float)
    views = np.maximum(counts["impressions"].to_numpy().astype(float), clicks)  # an impression may be lost, not a click

    positions = int(position.max(initial=-1)) + 1
    examined = np.linspace(1.0, 0.3, positions)
    attractive = np.full(len(pairs), config.prior_clicks / config.prior_views)
    seen = np.maximum(np.bincount(position, views, positions), 1e-9)
    shown = np.bincount(pair, views, len(pairs)) + config.prior_views
    for _ in range(config.em_rounds):
        at, of = examined[position], attractive[pair]
        unclicked = (views - clicks) / np.maximum(1 - at * of, 1e-9)
        examined = np.bincount(position, clicks + unclicked * at * (1 - of), positions) / seen
        examined = np.clip(examined / max(examined.max(initial=0), 1e-9), 1e-6, 1.0)
        attractive = np.bincount(pair, clicks + unclicked * of * (1 - at), len(pairs)) + config.prior_clicks
        attractive = np.clip(attractive / shown, 0.0, 1.0)
    purchases = np.bincount(pair, counts["purchases"].to_numpy(), len(pairs))
    pairs = pairs.append_column("attraction", pa.array(attractive)).append_column("purchases", pa.array(purchases))
    return pairs, examined


def affinity(pairs: pa.Table, config: LabelingConfig) -> pa.Table:
    """Return query_id, item_id, affinity: attraction above what an unseen pair has, with a bonus for purchases."""
    bonus = config.purchase_bonus * (2 - np.exp2(1 - pairs["purchases"].to_numpy()))
    above = pairs["attraction"].to_numpy() - config.prior_clicks / config.prior_views
    values = np.maximum(above, 0) + np.where(pairs["purchases"].to_numpy() > 0, bonus, 0)
    table = pairs.select(["query_id", "item_id"]).append_column("affinity", pa.array(values))
    return table.filter(pc.greater(table["affinity"], 0))


def best_candidates(pairs: pa.Table, count: int) -> pa.Table:
    """Keep each query's `count` items of greatest affinity."""
    ordered = pairs.sort_by([("query_id", "ascending"), ("affinity", "descending"), ("item_id", "ascending")])
    first = np.flatnonzero(_begins(ordered["query_id"]))
    rank = np.arange(len(ordered)) - np.repeat(first, np.diff(first, append=len(ordered)))
    return ordered.filter(pa.array(rank < count))


def item_similarity(pairs: pa.Table, minimum: float, support: float = 0.0) -> pa.Table:
    """Return left, right, similarity: the cosine of two items' affinities over queries, where it is at least `minimum`.

    A query's affinities count with unit length, so that a photo seen a thousand times has one vote. `support` is added
    to both items' own votes: two items that few photos want are not alike because one photo's clicks hit both.
    """
    squares = pairs.set_column(2, "square", pc.power(pairs["affinity"], 2))
    lengths = squares.group_by("query_id").aggregate([("square", "sum")])
    voted = pairs.join(lengths, "query_id")
    vote = pc.divide(voted["affinity"], pc.sqrt(voted["square_sum"]))
    votes = voted.select(["query_id", "item_id"]).append_column("vote", vote)
    both = votes.rename_columns(["query_id", "left", "left_vote"]).join(
        votes.rename_columns(["query_id", "right", "right_vote"]), "query_id", join_type="inner"
    )
    both = both.filter(pc.less_equal(both["left"], both["right"]))
    both = both.append_column("product", pc.multiply(both["left_vote"], both["right_vote"]))
    dots = both.group_by(["left", "right"]).aggregate([("product", "sum")])
    own = dots.filter(pc.equal(dots["left"], dots["right"])).select(["left", "product_sum"])
    dots = dots.filter(pc.not_equal(dots["left"], dots["right"]))
    dots = dots.join(own.rename_columns(["left", "left_own"]), "left")
    dots = dots.join(own.rename_columns(["right", "right_own"]), "right")
    cosine = pc.divide(dots["product_sum"], pc.sqrt(_product(dots["left_own"], dots["right_own"], support)))
    cosine = pc.round(cosine, 9)  # threads sum in any order: the last bits must not break ties
    table = dots.select(["left", "right"]).append_column("similarity", cosine)
    return table.filter(pc.greater_equal(cosine, minimum))


def _product(left: pa.ChunkedArray, right: pa.ChunkedArray, support: float) -> pa.ChunkedArray:
    return pc.multiply(pc.add(left, support), pc.add(right, support))


def cluster_items(similarity: pa.Table, item_ids: pa.Array, config: LabelingConfig) -> pa.Table:
    """Return item_id, class_id: Louvain communities, numbered by their smallest item (Blondel et al. 2008).

    Communities, not connected components: one wrong click must not chain two things together.
    """
    graph = nx.Graph()
    graph.add_nodes_from(sorted(item_ids.to_pylist()))
    edges = similarity.sort_by([("left", "ascending"), ("right", "ascending")])
    known = graph.nodes
    graph.add_weighted_edges_from(
        (left, right, weight)
        for left, right, weight in zip(*(edges[name].to_pylist() for name in edges.column_names), strict=True)
        if left in known and right in known
    )
    communities = nx.community.louvain_communities(graph, resolution=config.resolution, seed=config.seed)
    ordered = sorted(sorted(community) for community in communities)
    return pa.table(
        {
            "item_id": pa.array([item for community in ordered for item in community], pa.string()),
            "class_id": pa.array([label for label, community in enumerate(ordered) for _ in community], pa.int64()),
        }
    )


def assign_queries(pairs: pa.Table, items: pa.Table, min_confidence: float) -> pa.Table:
    """Return query_id, class_id, confidence: the class with most of a query's affinity, if that is enough of it."""
    schema = pa.schema([("query_id", pa.string()), ("class_id", pa.int64()), ("confidence", pa.float32())])
    by_class = pairs.join(items, "item_id", join_type="inner").group_by(["query_id", "class_id"])
    summed = by_class.aggregate([("affinity", "sum")])
    totals = summed.group_by("query_id").aggregate([("affinity_sum", "sum")])
    summed = summed.join(totals, "query_id")
    share = pc.divide(summed["affinity_sum"], summed["affinity_sum_sum"])
    ranked = summed.select(["query_id", "class_id"]).append_column("confidence", pc.cast(share, pa.float32()))
    ranked = ranked.sort_by([("query_id", "ascending"), ("confidence", "descending"), ("class_id", "ascending")])
    best = ranked.filter(pa.array(_begins(ranked["query_id"])))
    return best.filter(pc.greater_equal(best["confidence"], min_confidence)).cast(schema)


def _begins(column: pa.ChunkedArray) -> np.ndarray:
    """Return bool [rows]: where a value differs from the one before."""
    codes = pc.dictionary_encode(column).combine_chunks().indices.to_numpy()
    return np.diff(codes, prepend=-1) != 0
