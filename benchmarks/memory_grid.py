"""What ``memory.py`` runs: models, and the configurations of a CPU and of a GPU, each by what sets it apart from the usual one.

On a GPU the models are large enough that tensors decide, and not what libraries take; the 1.1 B has grouped heads, the 0.5 B has not.
"""

from typing import Any

import workload
from workload import Shape

Configuration = dict[str, Any]
SMALL = Shape(width=64, layers=1, mlp=128, heads=2, vocabulary=256, rank=4)
MODELS = {
    "small": SMALL,
    "0.7m": Shape(width=128, layers=2, mlp=384, heads=8, kv_heads=4, vocabulary=2048),
    "13m": Shape(width=256, layers=6, mlp=768, heads=4, vocabulary=16_000),
    "40m": Shape(width=512, layers=6, mlp=1536, heads=8, vocabulary=24_000),
    "134m": Shape(width=768, layers=12, mlp=2048, heads=12, vocabulary=32_000),
    "0.5b": Shape(width=1536, layers=14, mlp=4096, heads=12, vocabulary=32_000),
    "1.1b": workload.MODELS["1.1b"],
}
USUAL: Configuration = {"model": "40m", "dtype": "bf16", "base": None, "rank": 16, "lengths": [512, 377, 290, 160]}
CPU: list[Configuration] = [
    *({"base": base} for base in (None, "nf4", "fp4", "int8")),
    *({"base": base, "model": "134m"} for base in (None, "nf4", "int8")),
    *({"base": base, "model": "13m"} for base in (None, "nf4")),
    {"dtype": "fp32"},
    {"dtype": "fp32", "base": "nf4"},
    {"rank": 4},
    {"rank": 128},
    {"rank": 64, "model": "134m"},
    {"rank": 64, "model": "134m", "optimizer": "adamw8bit"},
    {"targets": ["q_proj", "v_proj"]},
    {"layers": "3-5"},
    {"checkpointed": 3},
    {"checkpointed": 6},
    {"checkpointed": 12, "model": "134m"},
    {"checkpointed": 12, "model": "134m", "base": "nf4", "rank": 64},
    {"lengths": [128] * 8},
    {"lengths": [2000, 1500]},
    {"lengths": [2000, 1500], "model": "134m", "checkpointed": 6},
    {"lengths": [512] * 8, "micro_batch_tokens": 1024},
    {"share": 0.2},
    {"dropout": 0.1},
    {"steps": 40, "model": "0.7m"},
    {"steps": 15},
]

USUAL_GPU = USUAL | {"model": "1.1b", "lengths": [700, 600, 400, 300]}
OPTIMIZERS = ("adamw", "adamw8bit", "paged-adamw", "paged-adamw8bit")
GPU: list[Configuration] = [
    *({"base": base} for base in (None, "nf4", "int8", "fp8")),
    *({"base": base, "model": "0.5b"} for base in (None, "nf4", "int8", "fp8")),
    *({"base": base, "model": "134m"} for base in (None, "nf4")),
    *({"base": base, "checkpointed": 22} for base in (None, "nf4", "int8", "fp8")),
    *({"rank": 128, "optimizer": optimizer} for optimizer in OPTIMIZERS),
    {"dtype": "fp32"},
    {"dtype": "fp32", "model": "0.5b"},
    {"dtype": "fp32", "model": "0.5b", "base": "nf4"},
    {"rank": 4},
    {"rank": 256, "base": "nf4"},
    {"targets": ["q_proj", "v_proj"]},
    {"targets": ["gate_proj", "up_proj", "down_proj"], "base": "nf4"},
    {"layers": "16-21"},
    {"checkpointed": 11},
    {"checkpointed": 22, "offload": True},
    {"checkpointed": 22, "offload": True, "base": "nf4", "rank": 64},
    {"checkpointed": 14, "model": "0.5b", "base": "nf4"},
    {"lengths": [128] * 16},
    {"lengths": [4000, 2500], "micro_batch_tokens": 8192, "checkpointed": 11},
    {"lengths": [4000, 2500], "micro_batch_tokens": 8192, "checkpointed": 22, "base": "nf4"},
    {"lengths": [512] * 8, "micro_batch_tokens": 1024},
    {"share": 0.2},
    {"dropout": 0.1},
    {"dropout": 0.1, "base": "nf4", "checkpointed": 22},
    {"steps": 15, "model": "0.5b"},
]
