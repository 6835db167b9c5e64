"""A/B tests: who gets which variant (`config`, `assignment`), what came of it (`exposures`), and what that shows
(`statistics`, `report`). Knows nothing of HTTP, engines or bundles.
"""
