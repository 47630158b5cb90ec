"""From any published checkpoint to a folder in the layout of the MLX ecosystem, and to Core ML.

The folder `convert/` of the repository is the package `fastvlm_mlx.convert`.
"""
