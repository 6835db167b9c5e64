"""Stage `tokenizer`: item vectors → Semantic IDs.

`stage` runs it from top to bottom and writes the catalogue. `config` has its settings and `methods` what each method
switches on; `rqvae` is the learned quantiser, `objectives` its losses, `kmeans` its start; `cooccurrence` mixes what
users did into the item vectors, `standardised` reads them; `assignment` makes SIDs unique, `quality` judges them,
`report` shows them, `sid_files` exchanges them with other tools.
"""
