"""A wish becomes an index: kinds that fit, settings that reach the recall, and nothing below it."""

from __future__ import annotations

import numpy as np
import pytest

from mixer.fast_faiss import faiss
from mixer.metrics import recall_of_neighbours
from mixer_platform.index.choose import (
    EXACT_UP_TO,
    NEAREST,
    Measured,
    candidates,
    exact_top_k,
    measure,
    number_of_lists,
    pick,
    pilot,
    right_of,
    sweep,
    training_size,
)
from mixer_platform.index.segments import bytes_per_vector, new_index, trained_template

DIM = 32


def clustered(count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(9).standard_normal((200, DIM))
    vectors = (centres[rng.integers(0, 200, count)] + 0.6 * rng.standard_normal((count, DIM))).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_kinds_follow_size_and_memory() -> None:
    assert candidates(EXACT_UP_TO, DIM) == ["Flat"]
    assert candidates(EXACT_UP_TO, DIM, 4 * DIM - 1) == ["SQ8", "SQ4"]
    assert candidates(EXACT_UP_TO, DIM, 1) == []
    kinds = candidates(1_000_000, 256)
    assert "IVF4096,PQ128x4fs,Refine(SQ8)" in kinds
    small = candidates(1_000_000, 256, 300)
    assert small
    assert set(small) < set(kinds)
    assert max(bytes_per_vector(new_index(kind, 256)) for kind in small) <= 300
    assert candidates(1_000_000, 256, 60) == ["OPQ32,IVF4096,PQ32x8", "OPQ16,IVF4096,PQ16x8"]
    assert candidates(1_000_000, 256, 1) == []
    for kind in candidates(1_000_000, 6):  # a dimension that few codes divide
        new_index(kind, 6)


def test_training_asks_for_enough() -> None:
    assert training_size("Flat", DIM) == 64
    assert training_size(f"IVF{number_of_lists(10**6)},Flat", DIM) == 64 * 4096
    with pytest.raises(ValueError, match="FAISS refuses 'IVF'"):
        training_size("IVF", DIM)


def test_settings_are_the_fastest_that_reach_the_wish_also_on_held_out_queries() -> None:
    measured = [
        Measured({"nprobe": 1}, 0.99, 0.90, 1e-5, 1e-5),
        Measured({"nprobe": 2}, 0.96, 0.97, 2e-5, 9e-3),
        Measured({"nprobe": 4}, 0.98, 0.98, 3e-5, 3e-5),
        Measured({"nprobe": 8}, 1.0, 1.0, 4e-5, 4e-5),
    ]
    assert pick(measured[::-1], 0.95) == measured[1]
    assert pick(measured, 0.95, latency_ms=1) == measured[2]
    assert pick(measured, 0.99) == measured[3]
    assert pick(measured[:3], 0.99) is None
    assert pick(measured, 0.95, latency_ms=0.001) is None


@pytest.mark.parametrize("factory", ["IVF64,Flat", "IVF64,PQ16x4fs,Refine(SQ8)", "HNSW16"])
def test_recall_over_shards_is_recall_of_their_union(factory: str) -> None:
    vectors, queries = clustered(6000, 1), clustered(60, 2)
    template = trained_template(factory, DIM, vectors)
    trials, exact = [], []
    for part in range(2):
        ids = np.arange(6000)[part::2]
        index = faiss.deserialize_index(template)
        index.add_with_ids(vectors[part::2], ids)
        exact.append(exact_top_k(queries, vectors[part::2], ids, 10))
        trials.append(sweep(index, queries, exact[-1][1], 0.9))
    measured = measure(trials, exact)
    whole = exact_top_k(queries, vectors, np.arange(6000), 10)[1]
    assert 0.9 <= max(each.recall for each in measured) <= 1
    for each in measured:
        found = [next(trial.found for trial in part if trial.settings == each.settings) for part in trials]
        merged = np.take_along_axis(
            np.concatenate([ids for _, ids in found], 1),
            np.argsort(-np.concatenate([scores for scores, _ in found], 1), axis=1, kind="stable")[:, :10],
            axis=1,
        )
        recalls = [len(set(one) & set(other)) / 10 for one, other in zip(merged, whole, strict=True)]
        assert each.recall == pytest.approx(np.mean(recalls[::2]))
        assert each.recall_held_out == pytest.approx(np.mean(recalls[1::2]))
    assert pick(measured, 0.9)


def test_between_the_steps_around_the_wish_there_is_one_more() -> None:
    vectors, queries = clustered(6000, 1), clustered(60, 2)
    index = faiss.deserialize_index(trained_template("IVF64,Flat", DIM, vectors))
    index.add_with_ids(vectors, np.arange(6000))
    exact = right_of(exact_top_k(queries, vectors, np.arange(6000), NEAREST))
    doubling = [{"nprobe": 2**power} for power in range(6)]
    every = {trial.settings["nprobe"]: trial for trial in sweep(index, queries, exact, 1.1)}
    reached = {nprobe: recall_of_neighbours(trial.found[1], exact, 10) for nprobe, trial in every.items()}
    wished = (reached[4] + reached[8]) / 2
    assert reached[4] < wished < reached[8], "a wish between two steps"
    *steps, between = [trial.settings for trial in sweep(index, queries, exact, wished)]
    assert steps == doubling[: len(steps)]
    assert between == {"nprobe": 6}
    assert sweep(index, queries, exact, 0.0)[-1].settings == {"nprobe": 1}, "nothing is below the first step"


@pytest.mark.parametrize("copies", [40, 600])
def test_copies_of_a_listing_are_all_right(copies: int) -> None:
    vectors, queries = np.repeat(clustered(6000 // copies, 5), copies, axis=0), clustered(60, 6)
    trials, exact = [], []
    for part in (np.arange(6000)[::2], np.arange(6000)[1::2], np.arange(0)):
        index = faiss.deserialize_index(trained_template("Flat", DIM, vectors))
        index.add_with_ids(vectors[part], part)
        exact.append(exact_top_k(queries, vectors[part[::-1]], part[::-1], NEAREST))
        trials.append(sweep(index, queries, right_of(exact[-1]), 0.95))
    (measured,) = measure(trials, exact)
    assert measured.recall == measured.recall_held_out == 1
    assert ((right_of(exact[0]) >= 0).sum(axis=1) == (20 if copies == 40 else 0)).all()


def test_a_shard_without_items_stands_in_nobodys_way() -> None:
    vectors, queries = clustered(6000, 1), clustered(60, 2)
    template = trained_template("IVF64,Flat", DIM, vectors)
    trials, exact = [], []
    for part in (np.arange(6000), np.arange(0)):
        index = faiss.deserialize_index(template)
        index.add_with_ids(vectors[part], part)
        exact.append(exact_top_k(queries, vectors[part], part, NEAREST))
        trials.append(sweep(index, queries, right_of(exact[-1]), 0.9))
    assert len(trials[0]) > len(trials[1])
    assert [each.settings for each in measure(trials, exact)] == [each.settings for each in trials[0]]


def test_a_pilot_tells_what_falls_short_and_what_takes_longer() -> None:
    sample, queries = clustered(4000, 3), clustered(40, 4)
    exact = exact_top_k(queries, sample, np.arange(4000), 10)
    lists = number_of_lists(40_000)
    short, _ = pilot(f"IVF{lists},PQ4x4fs,Refine(SQ4)", sample, queries, exact, 40_000, 0.999)
    assert 0 < short < 1
    by_list = [pilot(f"IVF{lists},SQ8", sample, queries, exact, items, 0.9) for items in (40_000, 40_000_000)]
    assert by_list[0][0] == by_list[1][0] == 0
    assert 0 < by_list[0][1] < by_list[1][1]
