"""The children's softmax against decoding's masked one, value and gradient."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from semantic_ids.codes import SidSpace
from semantic_ids.decoding.legal import EmptyAllowedSetError, LegalCodes, legal_log_softmax
from semantic_ids.trie import ROOT, SidTrie
from training.legal_softmax import child_log_probs

SPACE = SidSpace(3, 6)


@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 30), st.integers(0, 2), st.booleans())
def test_it_is_the_served_score_for_any_catalogue_and_any_mix_of_prefixes(seed, num_items, num_rows, level, has_bias):
    rng = np.random.default_rng(seed)
    trie = SidTrie.build(SPACE, rng.integers(0, 6, (num_items, 3)))
    path = trie.path_of_rank(rng.integers(0, trie.num_items, num_rows))
    prefix = path[:, level - 1] if level else np.full(num_rows, ROOT)
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_rows, 4, generator=generator, requires_grad=True)
    weight = torch.randn(6, 4, generator=generator, requires_grad=True)
    bias = torch.randn(6, generator=generator, requires_grad=True) if has_bias else None
    inputs = [hidden, weight] + ([bias] if bias is not None else [])
    scores = child_log_probs(hidden, weight, bias, trie, prefix)
    logits = torch.nn.functional.linear(hidden, weight, bias)
    expected = legal_log_softmax(logits, LegalCodes.of(trie, prefix, hidden.device).mask)
    codes = torch.from_numpy(trie.tokens[path[:, level]].astype(np.int64))[:, None]
    torch.testing.assert_close(scores.of(path[:, level]), expected.gather(1, codes)[:, 0])
    torch.testing.assert_close(scores.log_probs.exp().sum(dim=1), torch.ones(num_rows))
    order = torch.randperm(6, generator=generator)  # the same head with its rows elsewhere
    elsewhere = child_log_probs(
        hidden, weight[order], None if bias is None else bias[order], trie, prefix, order.argsort()
    )
    torch.testing.assert_close(elsewhere.log_probs, scores.log_probs)
    ours = torch.autograd.grad(scores.of(path[:, level]).sum(), inputs)
    theirs = torch.autograd.grad(expected.gather(1, codes).sum(), inputs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@given(st.integers(0, 1_000), st.integers(1, 40))
def test_a_node_leaves_no_choice_exactly_where_its_children_are_one(seed, num_items):
    trie = SidTrie.build(SPACE, np.random.default_rng(seed).integers(0, 6, (num_items, 3)))
    assert trie.has_one_child(np.array([ROOT])).tolist() == [len(trie.root_children.node) == 1]
    for level in range(2):
        nodes = np.arange(trie.level_starts[level], trie.level_starts[level + 1])
        counts = np.bincount(trie.children(nodes).parent, minlength=len(nodes))
        assert trie.has_one_child(nodes).tolist() == (counts == 1).tolist()


def test_a_prefix_without_children_is_refused():
    """No trie that is built has such a node; a broken one must not answer with a number."""
    whole = SidTrie.build(SidSpace(2, 4), np.array([[0, 1], [1, 2]]))
    broken = SidTrie(whole.space, whole.level_starts, whole.tokens, np.array([2, 2, 3], np.uint32), whole.leaf_rank)
    with pytest.raises(EmptyAllowedSetError, match="without any legal code"):
        child_log_probs(torch.zeros(1, 3), torch.zeros(4, 3), None, broken, np.array([0]))
