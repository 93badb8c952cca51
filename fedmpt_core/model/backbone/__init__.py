"""Frozen pairs of towers: pictures and words in, features of one shared space out."""
