"""Make mlx-lm's own tools take FastVLM folders: `load`, `generate`, `convert`, the server.

    import fastvlm_mlx.mlx_lm_plugin as plugin
    plugin.register()
    model, tokenizer = mlx_lm.load("FastVLM-0.5B-mlx")

or, from a shell, any command of mlx-lm:

    python -m fastvlm_mlx.mlx_lm_plugin server --model FastVLM-0.5B-mlx

mlx-lm finds an architecture as a module of `mlx_lm.models`, and an image processor in a table; this
puts ours in both places and changes nothing else. Text works with every layout in safetensors. For
pictures mlx-lm itself wants three things of a folder, which `fastvlm-mlx convert` writes: a
`vision_config` in config.json, `<image>` in the tokenizer, and a chat template that turns a
picture part into `<image>`.
"""

from __future__ import annotations

import sys

from fastvlm_mlx.device import prefer_openblas

# `llava` is left out: mlx-lm has a model of that type.
MODEL_TYPES = ("llava_qwen2", "llava_llama", "llava_mistral", "fastvlm", "fast_vlm")


def register() -> None:
    """Add FastVLM to mlx-lm in this process. May be called again."""
    prefer_openblas()
    from fastvlm_mlx.models import fastvlm
    from fastvlm_mlx.processing.processor import Processor

    for model_type in MODEL_TYPES:
        sys.modules[f"mlx_lm.models.{model_type}"] = fastvlm
    try:
        from mlx_lm.processors import PROCESSORS
    except ImportError:  # mlx-lm before 0.32, the last for Python 3.10, takes text alone
        return
    # mlx-lm asks for the last part of the name of the module that defines the model.
    PROCESSORS[fastvlm.__name__.rpartition(".")[2]] = Processor


if __name__ == "__main__":
    register()
    from mlx_lm.cli import main

    main()
