"""Reads models and adapters from folders and from the hub, and checks untrusted files."""
