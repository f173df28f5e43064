"""What speaks for two items being one thing; fast table code against loops that anyone can read."""

from __future__ import annotations

import collections
import itertools
import math

import numpy as np
import pytest

from mixer import item_pairs
from mixer.item_pairs import same_thing_evidence, title_similarity, titles_worth
from tests.mixer.tables import as_dict, items_of, random_pairs, table_of


@pytest.mark.parametrize("trust", [2.0, 100.0])
def test_evidence_of_one_thing_equals_the_naive_one(trust: float) -> None:
    rows, share = random_pairs(1), 0.1
    by_query: dict[str, dict[str, float]] = collections.defaultdict(dict)
    for query, item, value in rows:
        by_query[query][item] = value
    sums: dict = collections.defaultdict(float)
    for found in by_query.values():
        for left, right in itertools.combinations(sorted(found), 2):
            a, b = math.exp(found[left]), math.exp(found[right])
            if max(a, b) > 1:
                one = share * a * b + 1 - share
                two = share * a + share * b + 1 - 2 * share
                sums[left, right] += math.log(one / two)
    expected = {pair: min(max(value, -trust), trust) for pair, value in sums.items()}
    found = as_dict(same_thing_evidence(table_of("query_id item_id evidence", rows), share, trust))
    assert found == pytest.approx(expected, abs=1e-9)


def test_wanted_together_speaks_for_and_wanted_alone_against() -> None:
    pairs = [("p", "a", 5.0), ("p", "b", 5.0), ("p", "c", -5.0), ("q", "c", -5.0), ("q", "d", -5.0)]
    found = as_dict(same_thing_evidence(table_of("query_id item_id evidence", pairs), 0.1, 30))
    assert found["a", "b"] > 1
    assert found["a", "c"] < -1
    assert ("c", "d") not in found, "of two things that nobody wants nothing is said"


def test_title_similarity_equals_the_naive_one() -> None:
    titles = ["Red apple 1 kg", "apple, RED", "red pear", None, "", "milk", "Milk 1 l"]
    ids = [f"i{n}" for n in range(len(titles))]
    words = [set("".join(c if c.isalnum() else " " for c in (title or "").lower()).split()) for title in titles]
    rarity = {w: math.log(len(ids) / sum(w in some for some in words)) + 1e-3 for some in words for w in some}
    expected = {}
    for left, right in itertools.combinations(range(len(ids)), 2):
        if shared := words[left] & words[right]:
            norms = (math.sqrt(sum(rarity[word] ** 2 for word in words[n])) for n in (left, right))
            expected[ids[left], ids[right]] = sum(rarity[word] ** 2 for word in shared) / math.prod(norms)
    assert as_dict(title_similarity(items_of(ids, titles), 1000)) == pytest.approx(expected)
    assert as_dict(title_similarity(items_of(ids, titles), 1)) == {}, "no word of a single title makes a pair"
    assert len(title_similarity(items_of([]), 1000)) == 0


def test_of_many_alike_titles_the_most_alike_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    ids = [f"i{n:03}" for n in range(300)]
    titles = [" ".join(f"w{word}" for word in rng.choice(40, 4, replace=False)) for _ in ids]
    whole = as_dict(title_similarity(items_of(ids, titles), 1000, most=300))
    monkeypatch.setattr(item_pairs, "_WORDS_TOGETHER", 50)
    assert as_dict(title_similarity(items_of(ids, titles), 1000, most=300)) == pytest.approx(whole)
    around: dict[str, list[float]] = {item: [] for item in ids}
    for pair, value in whole.items():
        for item in pair:
            around[item].append(value)
    least = {item: sorted(values, reverse=True)[:5][-1] for item, values in around.items()}
    expected = {pair: value for pair, value in whole.items() if value > min(least[item] for item in pair) - 1e-9}
    assert len(expected) < len(whole) / 3
    assert as_dict(title_similarity(items_of(ids, titles), 1000, most=5)) == pytest.approx(expected)
    asked = list(itertools.islice(whole.keys() - expected.keys(), 20))
    besides = table_of("left right", [*asked, ("i000", "elsewhere")])
    found = as_dict(title_similarity(items_of(ids, titles), 1000, besides, most=5))
    assert found == pytest.approx(expected | {pair: whole[pair] for pair in asked})


def test_equal_titles_are_kept_or_left_together() -> None:
    ids, titles = [f"i{n:03}" for n in range(700)], ["one and the same"] * 700 + [None]
    found = as_dict(title_similarity(items_of([*ids, "x"], titles), 1000))
    assert len(found) == 700 * 699 / 2
    assert set(found.values()) == {1.0}


def test_titles_are_worth_what_behaviour_says_they_tell() -> None:
    rng = np.random.default_rng(0)
    alike = rng.random(4000)
    same = rng.random(4000) < 1 / (1 + np.exp(-(8 * alike - 5)))
    behaviour = np.where(same, 10.0, -10.0)
    before, worth = titles_worth(behaviour, alike)
    assert before == pytest.approx(-5, abs=0.7)
    assert worth == pytest.approx(8, abs=1)
    before, worth = titles_worth(np.where(rng.random(4000) < 0.1, 10.0, -10.0), alike)
    assert abs(worth) < 0.5
    assert before == pytest.approx(math.log(0.1 / 0.9), abs=0.5)
    assert titles_worth(np.zeros(4000), alike) == titles_worth(np.zeros(0), np.zeros(0)), "nothing is known"


def test_titles_are_not_worth_what_a_few_pairs_seem_to_say() -> None:
    """Wrong clicks: of pairs that are all two things a few look very much like one, and alike in their titles."""
    rng = np.random.default_rng(0)
    behaviour, alike = rng.normal(-2, 2, 20_000), rng.random(20_000) ** 4
    behaviour[:6], alike[:6] = 8.0, 0.9
    behaviour[behaviour < -6] = -6.0  # nothing is as sure of the others
    before, worth = titles_worth(behaviour, alike)
    assert before + worth < -1, "equal titles alone are no reason to join"
