"""Makes fuzz/corpus: for each parser small good files, and one file for each published weakness of parsers like it.

    python tests/python/fuzz_corpus.py

Needs nothing but Python. Files called good-… load; of the others, tests/tests/parsers/weaknesses.rs says how each is met. The bytes are written
here by hand, apart from the project's own writers.
"""

import base64
import io
import json
import pathlib
import struct
import zipfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
CORPUS = ROOT / "fuzz" / "corpus"


def write(parser, name, content):
    folder = CORPUS / parser
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


# GGUF: ggml's docs/gguf.md.

F32, I8 = 0, 24
U32_KIND, I32_KIND, F32_KIND, BOOL_KIND, STRING_KIND, ARRAY_KIND = 4, 5, 6, 7, 8, 9


def u32(n):
    return struct.pack("<I", n)


def u64(n):
    return struct.pack("<Q", n)


def text(s):
    s = s.encode()
    return u64(len(s)) + s


def number(key, n):
    return text(key) + u32(U32_KIND) + u32(n)


def string(key, s):
    return text(key) + u32(STRING_KIND) + text(s)


def real(key, x):
    return text(key) + u32(F32_KIND) + struct.pack("<f", x)


def flag(key, on):
    return text(key) + u32(BOOL_KIND) + bytes([on])


def strings(key, values):
    return text(key) + u32(ARRAY_KIND) + u32(STRING_KIND) + u64(len(values)) + b"".join(map(text, values))


def packed(key, kind, form, values):
    return text(key) + u32(ARRAY_KIND) + u32(kind) + u64(len(values)) + struct.pack(f"<{len(values)}{form}", *values)


def tensor(name, dims, offset, kind=F32, rank=None):
    return text(name) + u32(len(dims) if rank is None else rank) + b"".join(map(u64, dims)) + u32(kind) + u64(offset)


def gguf(entries, tensors, data=b"", counts=None):
    n_tensors, n_entries = counts or (len(tensors), len(entries))
    head = b"GGUF" + u32(3) + u64(n_tensors) + u64(n_entries) + b"".join(entries) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


def placed(shapes):
    """The table entries and the data of float tensors of these shapes, one after the other."""
    entries, data = [], b""
    for name, dims in shapes:
        entries.append(tensor(name, dims, len(data)))
        count = 1
        for d in dims:
            count *= d
        data += bytes(4 * count)
        data += bytes(-len(data) % 32)
    return entries, data


TOKENS = ["<unk>", "<s>", "</s>", "\u2581", "a", "b", "\u2581a", "ab"]
ARCHITECTURE = string("general.architecture", "llama")
TOKENIZER = [
    string("tokenizer.ggml.model", "llama"),
    strings("tokenizer.ggml.tokens", TOKENS),
    packed("tokenizer.ggml.scores", F32_KIND, "f", [-float(i) for i in range(len(TOKENS))]),
    packed("tokenizer.ggml.token_type", I32_KIND, "i", [2, 3, 3, 1, 1, 1, 1, 1]),
    number("tokenizer.ggml.bos_token_id", 1),
    number("tokenizer.ggml.eos_token_id", 2),
    flag("tokenizer.ggml.add_bos_token", True),
    string("tokenizer.chat_template", "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"),
]
SHAPE = [
    ARCHITECTURE,
    number("llama.block_count", 1),
    number("llama.context_length", 64),
    number("llama.embedding_length", 8),
    number("llama.feed_forward_length", 12),
    number("llama.attention.head_count", 4),
    number("llama.attention.head_count_kv", 2),
    real("llama.attention.layer_norm_rms_epsilon", 1e-5),
]
LAYER = [
    ("attn_norm", [8]), ("attn_q", [8, 8]), ("attn_k", [8, 4]), ("attn_v", [8, 4]), ("attn_output", [8, 8]),
    ("ffn_norm", [8]), ("ffn_gate", [8, 12]), ("ffn_up", [8, 12]), ("ffn_down", [12, 8]),
]  # fmt: skip
MODEL = [("token_embd.weight", [8, len(TOKENS)]), ("output_norm.weight", [8])]
MODEL += [(f"blk.0.{name}.weight", dims) for name, dims in LAYER]


def with_entry(key, entry):
    """The good file with the entry `key` written otherwise."""
    entries = [entry if e.startswith(text(key)) else e for e in SHAPE]
    return gguf(entries, *placed(MODEL))


def gguf_files():
    put = lambda name, content: write("gguf", name, content)
    put("good-llama.gguf", gguf(SHAPE + TOKENIZER, *placed(MODEL)))
    one = lambda entry: gguf([ARCHITECTURE], [entry], bytes(64))
    put("cve-2024-39720.gguf", b"GGUF")
    put("cve-2024-23605.gguf", gguf([ARCHITECTURE], [], counts=(0, (1 << 64) // 48 + 1)))
    put("cve-2024-21836.gguf", gguf([ARCHITECTURE], [], counts=((1 << 64) // 88 + 1, 1)))
    put("cve-2026-27940.gguf", gguf([ARCHITECTURE], [], counts=((1 << 64) // 368 + 1, 1)))
    put("cve-2024-23496.gguf", gguf([u64((1 << 64) - 1) + b"general"], []))
    put("cve-2024-21825.gguf", gguf([text("a") + u32(ARRAY_KIND) + u32(STRING_KIND) + u64((1 << 60) + 1) + text("b")], []))
    put("cve-2024-25667.gguf", gguf([text("a") + u32(ARRAY_KIND) + u32(10) + u64((1 << 61) + 1) + u64(0)], []))
    put("cve-2024-25668.gguf", gguf([text("a") + u32(ARRAY_KIND) + u32(STRING_KIND) + u64(1) + u64((1 << 64) - 1)], []))
    put("cve-2025-49847.gguf", gguf([ARCHITECTURE, text("tokenizer.ggml.tokens") + u32(9) + u32(8) + u64(1) + u64(1 << 31)], []))
    put("cve-2024-21802.gguf", one(tensor("t", [1] * 9, 0)))
    put("cve-2026-33298.gguf", one(tensor("t", [4096, (1 << 50) + 1], 0)))
    large = (1 << 63) - 64
    put("cve-2025-53630.gguf", gguf([ARCHITECTURE], [tensor("a", [large], 0, I8), tensor("b", [large], large, I8)], bytes(64)))
    put("cve-2026-7482.gguf", one(tensor("t", [1024, 1024], 0)))
    put("ghsa-3p75-pq92-q28f.gguf", one(tensor("t", [8, 0], 0)))
    put("llama-cpp-27203.gguf", one(tensor("t", [(1 << 63) - 1, 2], 0, I8)))
    put("llama-cpp-25378.gguf", one(tensor("t", [1], 0, rank=0xFFFFFFFF)))
    put("cve-2025-0317.gguf", gguf([number("general.alignment", 0)], []))
    put("alignment-3.gguf", gguf([number("general.alignment", 3)], []))
    put("llama-cpp-26318.gguf", gguf([text("general.alignment") + u32(I32_KIND) + u32(32)], []))
    put("tensor-type.gguf", one(tensor("t", [8], 0, 0xFFFFFFFF)))
    put("value-type.gguf", gguf([text("a") + u32(13) + u32(0)], []))
    put("keys-twice.gguf", gguf([ARCHITECTURE, ARCHITECTURE], []))
    put("tensors-twice.gguf", gguf([ARCHITECTURE], [tensor("t", [8], 0), tensor("t", [8], 32)], bytes(64)))
    put("overlap.gguf", gguf([ARCHITECTURE], [tensor("a", [16], 0), tensor("b", [8], 32)], bytes(64)))
    put("misaligned.gguf", one(tensor("t", [8], 4)))
    put("half-blocks.gguf", one(tensor("t", [31], 0, 8)))
    nested = text("a") + (u32(ARRAY_KIND) + u32(ARRAY_KIND) + u64(1)) * 2000
    put("nested-arrays.gguf", gguf([nested], []))
    put("cve-2024-8063.gguf", with_entry("llama.block_count", string("llama.block_count", "one")))
    put("layers.gguf", with_entry("llama.block_count", number("llama.block_count", 0xFFFFFFFF)))
    put("no-heads.gguf", with_entry("llama.attention.head_count", number("llama.attention.head_count", 0)))


# safetensors: the format's README.


def safetensors(header, data=0, length=None):
    header = header if isinstance(header, str) else json.dumps(header)
    return u64(len(header) if length is None else length) + header.encode() + bytes(data)


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HF_LAYER = {
    "input_layernorm": [8], "self_attn.q_proj": [8, 8], "self_attn.k_proj": [4, 8], "self_attn.v_proj": [4, 8], "self_attn.o_proj": [8, 8],
    "post_attention_layernorm": [8], "mlp.gate_proj": [12, 8], "mlp.up_proj": [12, 8], "mlp.down_proj": [8, 12],
}  # fmt: skip
HF_MODEL = {"model.embed_tokens.weight": [8, 8], "model.norm.weight": [8]}
HF_MODEL |= {f"model.layers.0.{name}.weight": shape for name, shape in HF_LAYER.items()}


GPTQ_LAYER = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
GPTQ_MODEL = {"model.embed_tokens.weight": [8, 32], "model.norm.weight": [32]}
GPTQ_MODEL |= {f"model.layers.0.{name}.weight": [32] for name in ["input_layernorm", "post_attention_layernorm"]}
for name in GPTQ_LAYER:
    parts = {"qweight": [4, 32], "qzeros": [1, 4], "scales": [1, 32], "g_idx": [32]}
    GPTQ_MODEL |= {f"model.layers.0.{name}.{part}": shape for part, shape in parts.items()}


def model_safetensors(shapes):
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        integers, halves = name.endswith(("qweight", "qzeros", "g_idx")), name.endswith("scales")
        size = 2 if halves else 4
        for d in shape:
            size *= d
        header[name] = entry(shape, at, at + size, "I32" if integers else "F16" if halves else "F32")
        at += size
    return safetensors(header, at)


def safetensors_files():
    put = lambda name, content: write("safetensors", name, content)
    put("good-llama.safetensors", model_safetensors(HF_MODEL))
    put("header-length.safetensors", safetensors({}, length=(1 << 64) - 1))
    put("header-past-end.safetensors", safetensors({}, length=3))
    put("overlap.safetensors", safetensors({"a": entry([4], 0, 16), "b": entry([4], 8, 24)}, 24))
    put("hole.safetensors", safetensors({"a": entry([4], 0, 16), "b": entry([4], 32, 48)}, 48))
    put("polyglot.safetensors", safetensors({"a": entry([4], 0, 16)}, 64))
    twice = json.dumps({"a": entry([4], 0, 16)})[:-1] + ', "a": ' + json.dumps(entry([8], 0, 32)) + "}"
    put("keys-twice.safetensors", safetensors(twice, 32))
    put("shape-overflow.safetensors", safetensors({"a": entry([1 << 32, 1 << 32], 0, 0)}))
    put("negative-shape.safetensors", safetensors({"a": entry([-4, -1], 0, 16)}, 16))
    put("reversed.safetensors", safetensors({"a": entry([4], 16, 0)}, 16))
    put("past-end.safetensors", safetensors({"a": entry([1 << 20], 0, 1 << 22)}, 16))
    put("length.safetensors", safetensors({"a": entry([8], 0, 16)}, 16))
    put("type.safetensors", safetensors({"a": entry([4], 0, 16, "PICKLE")}, 16))
    put("nested.safetensors", safetensors('{"__metadata__":' + "[" * 20000))
    put = lambda name, content: write("packed", name, content)
    good = model_safetensors(GPTQ_MODEL)
    put("good-gptq.safetensors", good)
    put("zero-extent.safetensors", model_safetensors(GPTQ_MODEL | {"model.layers.0.mlp.up_proj.qweight": [0, 1 << 61]}))
    put("rows.safetensors", model_safetensors(GPTQ_MODEL | {"model.layers.0.mlp.up_proj.qweight": [4, 31]}))
    put("groups.safetensors", model_safetensors(GPTQ_MODEL | {"model.layers.0.mlp.up_proj.qweight": [5, 32]}))
    put("scales.safetensors", model_safetensors({n: s for n, s in GPTQ_MODEL.items() if n != "model.layers.0.mlp.up_proj.scales"}))
    put("scale-type.safetensors", good.replace(b'.mlp.up_proj.scales": {"dtype": "F16"', b'.mlp.up_proj.scales": {"dtype": "I16"'))
    index = lambda file: json.dumps({"metadata": {"total_size": 32}, "weight_map": {"a": "model-1.safetensors", "b": file}})
    put = lambda name, content: write("index", name, content)
    put("good-index.json", index("model-2.safetensors"))
    put("parent.json", index("../../../etc/passwd"))
    put("absolute.json", index("/etc/passwd"))
    put("backslash.json", index("..\\x.safetensors"))
    put("nul.json", index("model.safetensors\0.txt"))
    put("twice.json", index("model-2.safetensors").replace('"b"', '"a"'))


# PyTorch: PEP 307, pickletools, APPNOTE.TXT of ZIP.


def pickled_text(s):
    s = s.encode()
    return b"X" + u32(len(s)) + s


def pickled_int(n):
    return b"J" + u32(n) if n < 1 << 31 else b"\x8a\x08" + u64(n)


def pickled_tuple(numbers):
    return b"(" + b"".join(map(pickled_int, numbers)) + b"t"


def view(key, elements, first, shape, strides):
    storage = b"(" + pickled_text("storage") + b"ctorch\nFloatStorage\n" + pickled_text(key) + pickled_text("cpu") + pickled_int(elements) + b"tQ"
    hooks = b"\x89ccollections\nOrderedDict\n)R"
    arguments = b"(" + storage + pickled_int(first) + pickled_tuple(shape) + pickled_tuple(strides) + hooks + b"t"
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R"


def pickle(entries):
    return b"\x80\x02}(" + b"".join(pickled_text(name) + value for name, value in entries.items()) + b"u."


def archive(entries, method=zipfile.ZIP_STORED):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as file:
        for name, content in entries.items():
            info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            info.compress_type = method
            file.writestr(info, content)
    return out.getvalue()


WEIGHT = view("0", 12, 0, [3, 4], [4, 1])


def pytorch(content, **more):
    return archive({"m/data.pkl": content, "m/byteorder": b"little", "m/data/0": bytes(48), **more})


def calling(module, name, argument):
    return pickle({"w": f"c{module}\n{name}\n".encode() + pickled_text(argument) + b"\x85R"})


def pytorch_files():
    put = lambda name, content: write("pytorch", name, content)
    good = pytorch(pickle({"w": WEIGHT, "turned": view("0", 12, 0, [4, 3], [1, 4])}))
    put("good-state.pt", good)
    put("reduce.pt", pytorch(calling("posix", "system", "true")))
    put("cve-2025-32434.pt", pytorch(calling("torch._utils", "_rebuild_wrapper_subclass", "true")))
    put("cve-2025-1716.pt", pytorch(calling("pip", "main", "install")))
    put("eval.pt", pytorch(calling("builtins", "eval", "1")))
    put("numpy.pt", pytorch(calling("numpy.core.multiarray", "_reconstruct", "x")))
    put("hub.pt", pytorch(calling("torch.hub", "load", "x")))
    stacked = pickled_text("pkgutil") + pickled_text("resolve_name") + b"\x93" + pickled_text("os:system") + b"\x85R"
    put("resolve-name.pt", pytorch(pickle({"w": stacked})))
    put("inst.pt", pytorch(b"\x80\x02(" + pickled_text("true") + b"ios\nsystem\n."))
    put("object.pt", pytorch(pickle({"w": b"cos\nsystem\n" + pickled_text("true") + b"\x85\x81"})))
    put("state.pt", pytorch(pickle({"w": WEIGHT + b"}" + pickled_text("a") + b"K\x01sb"})))
    put("early.pt", pytorch(b"\x80\x02cposix\nsystem\n" + pickled_text("true") + b"\x85R" + b"\xff" * 20))
    put("storage-bounds.pt", pytorch(pickle({"w": view("0", 12, 0, [3, 4], [1 << 40, 1])})))
    put("storage-size.pt", pytorch(pickle({"w": view("0", 1 << 40, 0, [1 << 40], [1])})))
    put("repeated.pt", pytorch(pickle({"w": view("0", 12, 0, [1 << 30, 1], [0, 1])})))
    put("memo.pt", pytorch(b"\x80\x02}r\xff\xff\xff\x7f."))
    put("marks.pt", pytorch(b"\x80\x02" + b"(" * 20000 + b"."))
    put("laughs.pt", pytorch(b"\x80\x02]" + b"q\x00h\x00\x86" * 5000 + b"."))
    put("deep.pt", pytorch(b"\x80\x02)" + b"\x85" * 20000 + b"."))
    put("long.pt", pytorch(b"\x80\x02X\xff\xff\xff\x7f."))
    put("bomb.pt", archive({"m/data.pkl": pickle({"w": WEIGHT}), "m/data/0": bytes(1 << 20)}, zipfile.ZIP_DEFLATED))
    local = lambda of: of.index(b"PK\x01\x02")
    name = good.index(b"m/data.pkl")
    put("cve-2025-1944.pt", good[:name] + b"m/dada.pkl" + good[name + 10 :])
    at = local(good) + 8
    put("cve-2025-1945.pt", good[:at] + b"\x01" + good[at + 1 :])
    hidden = good[: name - 30 + 8] + b"\x08" + good[name - 30 + 9 :]
    put("method.pt", hidden)
    put("cve-2025-1889.pt", pytorch(pickle({"w": WEIGHT}), **{"n/data.pkl": calling("posix", "system", "true")}))
    put("script.pt", pytorch(pickle({"w": WEIGHT}), **{"m/constants.pkl": b""}))
    end = good.rindex(b"PK\x05\x06")
    put("entries.pt", good[: end + 8] + b"\xf0\xff\xf0\xff" + good[end + 12 :])
    put("directory.pt", good[: end + 12] + u32(1 << 31) + good[end + 16 :])
    put("zip64.pt", good[:end] + b"PK\x06\x07" + u32(0) + u64((1 << 64) - 1) + u32(1) + good[end : end + 16] + u32(0xFFFFFFFF) + b"\0\0")
    entries = [i for i in range(len(good)) if good.startswith(b"PK\x01\x02", i)]
    two = pytorch(pickle({"a": WEIGHT, "b": view("1", 12, 0, [3, 4], [4, 1])}), **{"m/data/1": bytes(48)})
    entries = [i for i in range(len(two)) if two.startswith(b"PK\x01\x02", i)]
    put("overlap.pt", two[: entries[3] + 42] + two[entries[2] + 42 : entries[2] + 46] + two[entries[3] + 46 :])
    put("legacy.pt", bytes.fromhex("80028a0a6cfc9c46f9206aa850192e8002") + bytes(40))


# tokenizer.json, SentencePiece, vocab.txt, GGUF's keys.


def added(id, content):
    return {"id": id, "content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def tokenizer(**more):
    vocab = {"<s>": 0, "</s>": 1, "<unk>": 2, "a": 3, "b": 4, "ab": 5, "\u0120": 6, "\u0120a": 7}
    model = {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None, "end_of_word_suffix": None}
    model |= {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "vocab": vocab, "merges": [["a", "b"], ["\u0120", "a"]]}
    levels = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    file = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [added(0, "<s>"), added(1, "</s>")]}
    file |= {"normalizer": None, "pre_tokenizer": levels, "post_processor": None, "decoder": levels, "model": model}
    return file | more


def split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def tokenizer_files():
    put = lambda name, content: write("tokenizer_json", name, json.dumps(content) if isinstance(content, dict) else content)
    put("good-bpe.json", tokenizer())
    pieces = [["<unk>", 0.0], ["\u2581", -1.0], ["a", -2.0], ["\u2581a", -1.5]]
    unigram = {"type": "Unigram", "unk_id": 0, "vocab": pieces, "byte_fallback": False}
    marks = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
    put("good-unigram.json", tokenizer(model=unigram, pre_tokenizer=marks, decoder=marks, normalizer={"type": "NFKC"}, added_tokens=[]))
    words = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    words["vocab"] = {"[UNK]": 0, "a": 1, "##b": 2, "[CLS]": 3, "[SEP]": 4}
    bert = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": True}
    around = {"type": "BertProcessing", "sep": ["[SEP]", 4], "cls": ["[CLS]", 3]}
    pieces = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    put("good-wordpiece.json", tokenizer(
        model=words, normalizer=bert, pre_tokenizer={"type": "BertPreTokenizer"}, decoder=pieces, post_processor=around,
        added_tokens=[added(3, "[CLS]"), added(4, "[SEP]")],
    ))  # fmt: skip
    put("cve-2025-2099.json", tokenizer(pre_tokenizer=split(r"(?=((a+)+)+$)\2(a|a)*c|x")))
    wild = tokenizer()
    wild["model"]["vocab"]["c"] = 0xFFFFFFFE
    put("wild-id.json", wild)
    put("unknown-merge.json", tokenizer(model=tokenizer()["model"] | {"merges": [["x", "y"]]}))
    put("unknown-id.json", tokenizer(model=unigram | {"unk_id": 1 << 40}))
    put("size.json", tokenizer(pre_tokenizer=split("a{1000}{1000}{1000}")))
    put("nested.json", json.dumps(tokenizer())[:-1] + ',"x":' + "[" * 20000)
    steps = '{"type":"Sequence","normalizers":[' * 60 + "]}" * 60
    put("nested-steps.json", json.dumps(tokenizer()).replace('"normalizer": null', '"normalizer": ' + steps))
    charsmap = lambda content: tokenizer(normalizer={"type": "Precompiled", "precompiled_charsmap": base64.b64encode(content).decode()})
    put("charsmap-short.json", charsmap(b"\x01"))
    put("charsmap-length.json", charsmap(u32(0xFFFFFFFF) + bytes(8)))
    put("charsmap-trie.json", charsmap(u32(16) + b"\xff" * 16 + b"a\0"))
    put("charsmap-values.json", charsmap(u32(4096) + struct.pack("<1024I", *[0x1FF | i << 10 | 0x80000000 for i in range(1024)]) + b"a"))
    varint = lambda n: bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)
    field = lambda n, content: varint(n << 3 | 2) + varint(len(content)) + content
    whole = lambda n, value: varint(n << 3) + varint(value)
    piece = lambda s, score, kind: field(1, field(1, s.encode()) + varint(2 << 3 | 5) + struct.pack("<f", score) + whole(3, kind))
    all_pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), ("<0x0A>", 0.0, 6), ("\u2581a", -1.0, 1), ("a", -2.0, 1)]
    body = b"".join(piece(*p) for p in all_pieces)
    model = lambda trainer, normalizer: body + field(2, trainer) + field(3, normalizer)
    usual = whole(3, 2) + whole(35, 1)
    put = lambda name, content: write("sentencepiece", name, content)
    put("good-spm.model", model(usual, whole(3, 1) + whole(4, 0)))
    # "A" becomes "a": its place in the array, and behind it the place of the text.
    units = [0] * 0x142
    units[0], units[0x141], units[0x140] = 256 << 10, 0x41 | 1 << 8 | 1 << 10, 1 << 31
    table = u32(4 * len(units)) + struct.pack(f"<{len(units)}I", *units) + b"a\0"
    put("good-unigram.model", model(whole(3, 1) + whole(35, 1), field(2, table)))
    put("length.model", body + b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01")
    put("varint.model", b"\xff" * 11)
    put("group.model", body + b"\x0b")
    put("id.model", model(usual + whole(41, 1 << 31), whole(4, 0)))
    put("charsmap.model", model(usual, field(2, b"\xff" * 40) + whole(4, 0)))
    put("piece.model", b"\x0a\x05\x0a\x7fabc")
    put("utf8.model", field(1, field(1, b"\xff\xfe")))
    put = lambda name, content: write("vocab_txt", name, content)
    put("good-vocab.txt", "[PAD]\n[UNK]\n[CLS]\n[SEP]\na\n##b\nab\n")
    put("utf8.txt", b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n\xff\xfe\n")


# Chat templates.


def template_files():
    put = lambda name, content: write("chat_template", name, content)
    put("good-chatml.jinja", "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] | trim }}{% endfor %}")
    put("good-llama.jinja", "{{ bos_token }}{%- for m in messages -%}{% if loop.first %}{{ m.role }}{% else %}x{% endif %}{{ m | tojson }}{% endfor %}")
    put("cve-2024-34359.jinja", "{% for c in ().__class__.__base__.__subclasses__() %}{{ c.__init__.__globals__['os'].popen('id').read() }}{% endfor %}")
    put("cve-2026-5760.jinja", "{{ cycler.__init__.__globals__.os.popen('id').read() }}")
    put("lipsum.jinja", "{{ lipsum.__globals__['os'].system('id') }}")
    put("attr.jinja", "{{ messages | attr('__class__') | attr('__mro__') | first }}")
    put("cve-2025-61620.jinja", "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}")
    put("recursion.jinja", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}")
    put("output.jinja", "{% for i in range(9000) %}{{ 'x' * 10000 }}{% endfor %}")
    put("multiplied.jinja", "{{ 'x' * 1000000000 }}")
    doubling = "{% set ns = namespace(s='xxxxxxxxxxxxxxxx') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}"
    put("doubled.jinja", doubling)
    put("include.jinja", "{% include '/etc/passwd' %}")
    put("parentheses.jinja", "{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}")
    put("blocks.jinja", "{% if 1 %}" * 5000)
    nesting = lambda more: "{% set ns = namespace(x=[]) %}{% for i in range(100000) %}{% set ns.x = [ns.x] %}{% endfor %}" + more
    put("nested-values.jinja", nesting("x"))
    put("nested-json.jinja", nesting("{{ ns.x | tojson }}"))
    put("nested-text.jinja", nesting("{{ ns.x }}"))
    deep = "[" * 60 + "ns.x" + "]" * 60
    most = "{% set ns = namespace(x=[]) %}{% for i in range(100000) %}{% set ns.x = " + deep + " %}{% endfor %}"
    put("nested-most.jinja", most)
    put("nested-once.jinja", most.replace("100000", "1000") + "{{ ns.x | tojson }}")
    put("nested-shown.jinja", most.replace("100000", "6000") + "{{ ns.x }}")
    put("nested-compared.jinja", most.replace("100000", "6000") + "{{ ns.x == [ns.x] }}")
    put("minus.jinja", "{{ " + "-" * 20000 + "1 }}")
    put("elif.jinja", "{% if 0 %}" + "{% elif 0 %}" * 5000 + "{% endif %}")
    put("sum.jinja", "{{ 1" + "+1" * 20000 + " }}")
    put("fields.jinja", "{{ a" + ".a" * 20000 + " }}")
    put("filters.jinja", "{{ a" + "|e" * 20000 + " }}")
    put("ternary.jinja", "{{ " + "1 if 0 else " * 5000 + "1 }}")
    put("size.jinja", "x" * (1 << 16) + "x")
    put("nots.jinja", "{{ " + "not " * 16000 + "1 }}")


# Settings.

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "vocab_size": 8,
    "tie_word_embeddings": True, "hidden_act": "silu", "rope_theta": 10000.0,
}  # fmt: skip
ADAPTER = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"], "bias": "none"}
MANIFEST = """apiVersion: skein.dev/v1alpha1
kind: ModelDeployment
metadata:
  name: tiny
spec:
  model:
    uri: hf://org/tiny@main/model.gguf
  chat:
    template:
      builtin: Gemma
  parallelism:
    pipeline: 2
    tensor: 2
  engine:
    kvCache:
      memory: 64Mi
"""


def settings_files():
    put = lambda name, **more: write("config_json", name, json.dumps(CONFIG | more))
    put("good-llama.json")
    put("good-yarn.json", rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16})
    wide = {"hidden_size": 32, "intermediate_size": 32, "num_key_value_heads": 4}
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
    put("good-gptq.json", **wide, quantization_config=gptq)
    put("good-awq.json", **wide, quantization_config={"quant_method": "awq", "bits": 4, "group_size": 128, "version": "GEMM", "zero_point": True})
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    groups = {"group_0": {"weights": weights, "input_activations": {"dynamic": True}}}
    whole = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": groups}
    put("good-int8.json", **wide, quantization_config=whole)
    put("group-size.json", **wide, quantization_config=gptq | {"group_size": 0})
    put("layers.json", num_hidden_layers=1 << 40)
    put("no-heads.json", num_attention_heads=0)
    put("heads.json", num_attention_heads=3)
    put("hidden.json", hidden_size=1 << 62)
    put("negative.json", vocab_size=-1)
    put("factor.json", rope_scaling={"rope_type": "linear", "factor": 0})
    put("code.json", architectures=["Custom"], auto_map={"AutoModelForCausalLM": "modeling.Custom"})
    write("config_json", "nested.json", '{"a":' * 4000)
    put = lambda name, **more: write("adapter_json", name, json.dumps(ADAPTER | more))
    put("good-lora.json")
    put("rank.json", r=1 << 40)
    put("no-rank.json", r=0)
    put("pattern.json", target_modules="(.*)*q_proj{1000}{1000}{1000}")
    put("alpha.json", lora_alpha="x")
    write("manifest", "good-tiny.yaml", MANIFEST)
    laughs = "a: &a [x, x, x, x, x, x, x, x, x]\n"
    for this, before in zip("bcdefghi", "abcdefgh"):
        laughs += f"{this}: &{this} [" + ", ".join([f"*{before}"] * 9) + "]\n"
    write("manifest", "cve-2019-11253.yaml", laughs)
    write("manifest", "rustsec-2018-0006.yaml", "[" * 20000)
    write("manifest", "keys-twice.yaml", MANIFEST + "spec: {}\n")
    write("manifest", "tag.yaml", MANIFEST.replace("tiny\n", "!!python/object/apply:os.system [id]\n", 1))
    write("manifest", "number.yaml", MANIFEST.replace("pipeline: 2", "pipeline: 99999999999999999999999999"))


gguf_files()
safetensors_files()
pytorch_files()
tokenizer_files()
template_files()
settings_files()
