"""Decoding with torch: the one mask, scorer and constrained beam, for evaluation, rollouts and the local engine alike.

`legal` is the score's definition, `tree_decoder` runs a transformers model over many continuations of one prompt,
`beam` joins them with a trie and a filter.
"""
