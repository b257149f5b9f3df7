"""Softmax attention of explicit queries over explicit keys, with a bias."""
