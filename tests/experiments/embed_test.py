import numpy as np
import pytest

from experiments.embed import read_embeddings, write_embeddings


def test_vectors_are_found_by_their_captions(tmp_path):
    out, vectors = tmp_path / "new" / "words", np.eye(3, dtype=np.float32)
    with pytest.raises(ValueError, match=r"must be made by python -m experiments\.embed"):
        read_embeddings(out, ["a"])
    write_embeddings(out, ["a dog", "“a” 猫", "a hen"], vectors)
    found = read_embeddings(out, ["a hen", "“a” 猫", "a hen"])
    np.testing.assert_array_equal(found, vectors[[2, 1, 2]])
    assert sorted(path.name for path in out.parent.iterdir()) == ["words.json", "words.npy"]
    with pytest.raises(ValueError, match=r"captions must be in .*words\.json; given 'a cow' as"):
        read_embeddings(out, ["a hen", "a cow"])
