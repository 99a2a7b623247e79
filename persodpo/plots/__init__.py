"""Figures: tables in, matplotlib figures out, one module a figure.

Every module has a ``draw`` function that takes DataFrames and returns a `matplotlib.figure.Figure`. Only
`persodpo.plots.style` touches the disk. Nothing here imports a stage, torch or transformers, so that a figure can be
drawn again from its table anywhere.
"""
