"""A specification -> a torch module, and its way to disk and back.

Built-in architectures, Hugging Face, timm and models of the user's own; how they are trained lies in `distill`.
"""
