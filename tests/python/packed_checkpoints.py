"""Writes packed checkpoints of a tiny llama in each layout, and the same numbers as floats.

    python tests/python/packed_checkpoints.py FIXTURE OUT

FIXTURE is tests/fixtures/models/llama. Below OUT there is a folder for each layout, and beside it one called LAYOUT-f32 whose matrices are the
packed ones, each value computed from its layout's definition: scale * (q - zero). Needs nothing but Python. The layouts are those of AutoGPTQ 0.7
(and GPTQModel 4 for gptq_v2), AutoAWQ 0.2 (gemm) and compressed-tensors 0.20.
"""

import json
import pathlib
import struct
import sys

FIXTURE, OUT = map(pathlib.Path, sys.argv[1:])
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def read(folder):
    """Every tensor: type, shape, bytes."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        (length,) = struct.unpack_from("<Q", data)
        header = json.loads(data[8 : 8 + length])
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = (8 + length + at for at in entry["data_offsets"])
                tensors[name] = (entry["dtype"], entry["shape"], data[begin:end])
    return tensors


def write(folder, config, tensors):
    folder.mkdir(parents=True)
    header, at = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    content = struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values())
    (folder / "model.safetensors").write_bytes(content)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]:
        (folder / name).write_bytes((FIXTURE / name).read_bytes())


def bfloats(data):
    return [struct.unpack("<f", b"\0\0" + data[i : i + 2])[0] for i in range(0, len(data), 2)]


def half(x):
    return struct.unpack("<e", struct.pack("<e", x))[0]


def bfloat(x):
    """The nearest of the 8-bit significand, cut off: what is left is exact in 16 bits of either kind."""
    return struct.unpack("<f", struct.pack("<I", struct.unpack("<I", struct.pack("<f", x))[0] & 0xFFFF0000))[0]


def quantize(values, bits, symmetric, rounded, lowest):
    """Scale, zero point and integers of a group."""
    most = (1 << bits) - 1
    if symmetric:
        zero = 1 << (bits - 1)
        scale = rounded(max(map(abs, values)) / (zero - 1))
    else:
        low, high = min(values + [0.0]), max(values + [0.0])
        scale = rounded((high - low) / most)
        zero = max(lowest, min(most, round(-low / scale)))
    return scale, zero, [max(0, min(most, round(x / scale) + zero)) for x in values]


def words(integers, bits, order=None):
    """Words of consecutive integers, the first in the lowest bits."""
    per = 32 // bits
    order = order or range(per)
    out = []
    for i in range(0, len(integers), per):
        out.append(sum(integers[i + place] << bits * j for j, place in enumerate(order)))
    return out


def packed(integers):
    return struct.pack(f"<{len(integers)}I", *integers)


def columns(rows):
    return [list(column) for column in zip(*rows)]


def flat(rows):
    return [x for row in rows for x in row]


class Layout:
    def __init__(self, name, quantization, bits, group, symmetric, parts, rounded=half, lowest=0):
        self.name, self.quantization, self.bits, self.group = name, quantization, bits, group
        self.symmetric, self.parts, self.rounded, self.lowest = symmetric, parts, rounded, lowest

    def matrix(self, name, shape, values):
        """The tensors of a matrix as they are packed, and its values."""
        rows, width = shape
        group = width if self.group == -1 else self.group
        scales, zeros, integers, floats = [], [], [], []
        for r in range(rows):
            row = values[r * width : (r + 1) * width]
            groups = [quantize(row[i : i + group], self.bits, self.symmetric, self.rounded, self.lowest) for i in range(0, width, group)]
            if self.bits == 8:
                # The one integer that has no opposite.
                groups[0][2][r % group] = 0
            scales.append([scale for scale, _, _ in groups])
            zeros.append([zero for _, zero, _ in groups])
            integers.append(flat([q for _, _, q in groups]))
            floats += [scale * (q - zero) for scale, zero, qs in groups for q in qs]
        return self.parts(self, name.removesuffix("weight"), scales, zeros, integers, group), floats


def gptq(layout, name, scales, zeros, integers, group):
    width, rows, bits = len(integers[0]), len(integers), layout.bits
    along = columns([words(row, bits) for row in integers])
    stored = [[zero - layout.lowest for zero in column] for column in columns(zeros)]
    return {
        name + "qweight": ("I32", [len(along), rows], packed(flat(along))),
        name + "qzeros": ("I32", [width // group, rows * bits // 32], packed(flat([words(row, bits) for row in stored]))),
        name + "scales": ("F16", [width // group, rows], b"".join(struct.pack("<e", x) for x in flat(columns(scales)))),
        name + "g_idx": ("I32", [width], packed([i // group for i in range(width)])),
    }


def awq(layout, name, scales, zeros, integers, group):
    width, rows = len(integers[0]), len(integers)
    return {
        name + "qweight": ("I32", [width, rows // 8], packed(flat([words(row, 4, AWQ_ORDER) for row in columns(integers)]))),
        name + "qzeros": ("I32", [width // group, rows // 8], packed(flat([words(row, 4, AWQ_ORDER) for row in columns(zeros)]))),
        name + "scales": ("F16", [width // group, rows], b"".join(struct.pack("<e", x) for x in flat(columns(scales)))),
    }


def scale_of_rows(layout, name, scales):
    if layout.rounded is bfloat:
        return ("BF16", [len(scales), len(scales[0])], b"".join(struct.pack("<f", x)[2:] for x in flat(scales)))
    return ("F16", [len(scales), len(scales[0])], b"".join(struct.pack("<e", x) for x in flat(scales)))


def rows(layout, name, scales, zeros, integers, group):
    shape = [len(integers), len(integers[0])]
    parts = {
        name + "weight_packed": ("I32", [shape[0], shape[1] * layout.bits // 32], packed(flat([words(row, layout.bits) for row in integers]))),
        name + "weight_scale": scale_of_rows(layout, name, scales),
        name + "weight_shape": ("I64", [2], struct.pack("<2q", *shape)),
    }
    if not layout.symmetric:
        down = [words(column, layout.bits) for column in columns(zeros)]
        parts[name + "weight_zero_point"] = ("I32", [len(down[0]), len(down)], packed(flat(columns(down))))
    return parts


def signed(layout, name, scales, zeros, integers, group):
    values = [q - 128 for q in flat(integers)]
    return {
        name + "weight": ("I8", [len(integers), len(integers[0])], struct.pack(f"<{len(values)}b", *values)),
        name + "weight_scale": scale_of_rows(layout, name, scales),
    }


def gptq_config(bits, group, symmetric, form):
    return {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False, "sym": symmetric, "checkpoint_format": form}


def compressed_config(form, bits, group, symmetric):
    strategy = {"strategy": "channel"} if group == -1 else {"strategy": "group", "group_size": group}
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "actorder": None, "dynamic": False} | strategy
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"} if form == "int-quantized" else None
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups, "ignore": ["lm_head"], "kv_cache_scheme": None}


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
LAYOUTS = [
    Layout("gptq-4", gptq_config(4, 32, True, "gptq"), 4, 32, True, gptq, lowest=1),
    Layout("gptq-4-asymmetric", gptq_config(4, 64, False, "gptq"), 4, 64, False, gptq, lowest=1),
    Layout("gptq-4-v2", gptq_config(4, -1, False, "gptq_v2"), 4, -1, False, gptq),
    Layout("gptq-8", gptq_config(8, 128, True, "gptq"), 8, 128, True, gptq, lowest=1),
    Layout("awq", AWQ, 4, 32, False, awq),
    Layout("packed-4", compressed_config("pack-quantized", 4, 128, True), 4, 128, True, rows, bfloat),
    Layout("packed-4-asymmetric", compressed_config("pack-quantized", 4, 32, False), 4, 32, False, rows),
    Layout("packed-8", compressed_config("pack-quantized", 8, -1, True), 8, -1, True, rows),
    Layout("int8", compressed_config("int-quantized", 8, -1, True), 8, -1, True, signed, bfloat),
]

config, tensors = json.loads((FIXTURE / "config.json").read_text()), read(FIXTURE)
for layout in LAYOUTS:
    # A tensor that nothing reads, so that what is read of a file's beginning has no matrix in it.
    short, long = {"model.rotary_emb.inv_freq": ("F32", [1 << 19], bytes(1 << 21))}, {}
    for name, (dtype, shape, data) in tensors.items():
        if name.endswith("_proj.weight"):
            parts, floats = layout.matrix(name, shape, bfloats(data))
            short |= parts
            long[name] = ("F32", shape, struct.pack(f"<{len(floats)}f", *floats))
        else:
            short[name] = long[name] = (dtype, shape, data)
    write(OUT / layout.name, config | {"quantization_config": layout.quantization}, short)
    write(OUT / f"{layout.name}-f32", config, long)
