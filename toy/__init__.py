"""Toy data for a tiny diffusion language model: tokenizers, synthetic tasks and real text."""
