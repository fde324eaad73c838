"""A long tail of classes: which samples are left."""

import itertools

import numpy as np
import pytest

from saflex_jax.data import long_tail

# CIFAR-10-LT as published (Cao et al. 2019): 5,000 images of each class before.
PUBLISHED = {
    100: [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50],
    10: [5000, 3871, 2997, 2320, 1796, 1391, 1077, 834, 645, 500],
}


@pytest.mark.parametrize("ratio", PUBLISHED)
def test_class_sizes_are_the_published_ones(ratio):
    labels = np.repeat(np.arange(10), 5000)[np.random.default_rng(0).permutation(50_000)]
    kept = long_tail(labels, ratio=ratio, seed=0)
    assert (np.diff(kept) > 0).all()
    assert np.bincount(labels[kept]).tolist() == PUBLISHED[ratio]


# Classes 3, 5 and 8, of which 5 is the smallest; shuffled.
LABELS = np.repeat([3, 5, 8], [130, 100, 170])[np.random.default_rng(1).permutation(400)]


def test_the_smallest_class_sets_the_size_and_the_last_class_has_its_share():
    for ratio, sizes in ((1, [100] * 3), (2, [100, 70, 50]), (100, [100, 10, 1])):
        kept = long_tail(LABELS, ratio=ratio, seed=0)
        classes, counts = np.unique(LABELS[kept], return_counts=True)
        assert classes.tolist() == [3, 5, 8] and counts.tolist() == sizes


def test_a_share_that_rounds_below_a_whole_number_is_that_number():
    # 49 * 49**-1.0 is 0.9999999999999999.
    for size, ratio in ((49, 49), (98, 98), (98, 49), (103, 103), (147, 49), (700, 100)):
        labels = np.arange(2).repeat(size)
        kept = np.bincount(labels[long_tail(labels, ratio=ratio, seed=0)])
        assert kept.tolist() == [size, size // ratio]


def test_a_larger_ratio_keeps_a_part_of_what_a_smaller_one_keeps():
    draws = [set(long_tail(LABELS, ratio=ratio, seed=3)) for ratio in (1, 1.5, 4, 20, 100)]
    assert all(more > less for more, less in itertools.pairwise(draws))


def test_a_seed_draws_the_same_and_all_seeds_every_sample():
    def draw(seed):
        return long_tail(LABELS, ratio=4, seed=seed)

    np.testing.assert_array_equal(draw(0), draw(0))
    times = np.bincount(np.concatenate([draw(seed) for seed in range(300)]), minlength=400)
    for label, size, of in ((3, 100, 130), (5, 50, 100), (8, 25, 170)):
        share, found = size / of, times[LABELS == label] / 300
        # Six standard deviations: no sample is preferred.
        assert (np.abs(found - share) < 6 * np.sqrt(share * (1 - share) / 300)).all()


@pytest.mark.parametrize(
    "labels, ratio, message",
    [
        (LABELS, 0.9, "ratio must be >= 1 and finite; given 0.9"),
        (LABELS, np.inf, "ratio must be >= 1 and finite; given inf"),
        (LABELS, 101, "ratio must be at most 100, the size of the smallest class; given 101"),
        (np.zeros(5, int), 2, "labels must be of at least two classes; given 1"),
        (np.eye(3), 2, r"labels must have shape \[3\]"),
    ],
)
def test_a_tail_that_cannot_be_is_refused(labels, ratio, message):
    with pytest.raises(ValueError, match=message):
        long_tail(labels, ratio=ratio, seed=0)
