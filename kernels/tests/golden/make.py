"""Makes blocks.json: random stored rows of each block type and their values by the `gguf` package (numpy).

python3 make.py > blocks.json, with gguf 0.19.0 and numpy 2 installed.
"""
import json

import numpy as np
from gguf import GGMLQuantizationType, GGML_QUANT_SIZES
from gguf.quants import dequantize, quantize

TYPES = "Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 IQ4_NL MXFP4 Q2_K Q3_K Q4_K Q5_K Q6_K".split()
# Where a block has half-precision numbers, by type.
HALVES = {"MXFP4": [], "Q4_1": [0, 2], "Q5_1": [0, 2], "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}

random = np.random.default_rng(7)
out = {}
for name in TYPES:
    kind = GGMLQuantizationType[name]
    length, size = GGML_QUANT_SIZES[kind]
    blocks = 512 // length
    row = random.integers(0, 256, (blocks, size), dtype=np.uint8)
    for at in HALVES.get(name, [0]):
        row[:, at : at + 2] = (random.standard_normal((blocks, 1)) * 0.03).astype(np.float16).view(np.uint8)
    if name == "MXFP4":
        row[:, 0] = [0, 1, 2, 3, 100, 118, 119, 120, 121, 122, 123, 124, 125, 126, 127, 140]
    values = dequantize(row.reshape(-1), kind).astype(np.float32).reshape(-1)
    out[name] = {"stored": row.tobytes().hex(), "values": values.view(np.uint32).tolist()}
    if name in ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"):
        x = (random.standard_normal(512) * np.repeat([0.02, 1.0, 300.0, 0.0], 128)).astype(np.float32)
        x[x == 0] = 0.0  # no negative zeros: which zero is the least is numpy's choice
        out[name]["input"] = x.view(np.uint32).tolist()
        out[name]["quantized"] = quantize(x, kind).tobytes().hex()
print(json.dumps(out))
