"""Stage `tokenizer`: item vectors → Semantic IDs.

`stage` runs it from top to bottom and writes the catalogue; `methods` says what each method switches on; `rqvae` is the
learned quantiser and `objectives` its losses; `cooccurrence` mixes what users did into the item vectors; `assignment`
makes SIDs unique; `report` shows the result, `sid_files` exchanges SIDs with other tools.
"""
