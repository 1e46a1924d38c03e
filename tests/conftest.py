"""Puts this folder on sys.path (pytest does so for the folder of a conftest.py), so that tests can share helper modules."""
