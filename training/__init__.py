"""Offline: interactions and item text → one bundle. Never imports `service`."""
