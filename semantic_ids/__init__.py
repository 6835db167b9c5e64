"""The contract between training and service: what a Semantic ID is, which ones exist, and how a model is asked for one.

Something belongs here exactly when changing it on one side alone would silently give wrong recommendations.
Only numpy and pydantic are imported, except in `semantic_ids.decoding` (torch) and when `text_encoder` loads its model.
"""
