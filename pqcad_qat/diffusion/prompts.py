"""Prompts become the conditions of a text-conditional model: its own tokenizer and text encoder, through the library transformers.

Not here: what is done with conditions (conditions.py).
"""
