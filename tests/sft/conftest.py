"""Puts this folder on sys.path, so that the rooms below share its helper modules."""
