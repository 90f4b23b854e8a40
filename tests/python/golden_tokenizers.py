"""Makes the golden ids of tokenizers: those of the Python packages tokenizers and sentencepiece.

    python tests/python/golden_tokenizers.py [--train]

Needs `pip install tokenizers==0.23.3 sentencepiece==0.2.3`. Writes router/src/encode/golden/random-*.json: fixed texts with their ids, and the
SHA-256 of the ids of 10,000 strings that the tests make again by the same rule; bit n of `same` says that string n is decoded to itself. `--train` makes the
SentencePiece models anew, of the text in tests/fixtures/text; other machines may get other ones.
"""

import base64
import hashlib
import json
import os
import pathlib
import sys

import sentencepiece
import tokenizers

ROOT = pathlib.Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "router/src/encode/golden"
MODELS = ROOT / "tests/fixtures/models"
TEXT = ROOT / "tests/fixtures/text/wikitext2-valid-300k.txt"
STRINGS = 10_000
MASK = (1 << 64) - 1

# Ranges of code points that characters are drawn from.
POOLS = [
    (0x20, 0x7E), (0x61, 0x7A), (0x30, 0x39), (0x20, 0x20), (0x09, 0x0D), (0x00, 0x1F), (0xA0, 0x17F), (0x300, 0x36F),
    (0x5D0, 0x6FF), (0x2000, 0x206F), (0x2581, 0x2581), (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0x1F300, 0x1FAFF), (0x10FFF0, 0x10FFFF),
]

TEXTS = [
    "", " ", "  ", "\n", "\t", "a", " a", "a ", "Hello, world!", "The geese take turns in front, and close the gap.",
    "def f(x):\n    return [i ** 2 for i in range(x) if i % 2 == 0]\n", "fn main() {\n\tprintln!(\"{:>8.3}\", 3.14e-2);\n}\r\n",
    "<div class=\"a\">&amp;</div>", "SELECT * FROM t WHERE x != 'y' -- z", "https://example.org/a?b=c&d=%20#e", "1234567890 3.14159 1,000,000 0x1F",
    "日本語のテキスト。", "中文,没有空格", "한국어 텍스트", "Привет, мир", "שלום עולם", "مرحبا بالعالم", "ไทย", "हिन्दी",
    "e\u0301 n\u0303 a\u0308\u0323", "\u1e69 s\u0323\u0307", "\U0001f469\u200d\U0001f4bb \U0001f1e9\U0001f1ea \U0001f44d\U0001f3fd", "\u0000\u0001\u0007\u001b[0m\u007f",
    "\ufeffbom", "zero\u200bwidth\u00a0space\u2028line", "I'm you'LL they'd WE'VE don't", "   leading and trailing   ", "tabs\t\tand\n\n\nlines", "▁boundary ▁▁ marks▁",
    "<s>x</s>", "<unk>", "<0x0A><0xFF>", "<|begin_of_text|>", "<|im_start|>user", "<tool>call</tool>", "a<tool>", "x  y   z    w", "ﬁ ligature ½ ²", "\U0010ffff",
]


def splitmix(state):
    """Vigna's SplitMix64: the next state, and a number."""
    state = (state + 0x9E3779B97F4A7C15) & MASK
    z = state
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return state, z ^ (z >> 31)


def string(number):
    """String `number`: 1 to 24 characters."""
    state, length = splitmix(number)
    out = []
    for _ in range(1 + length % 24):
        state, pool = splitmix(state)
        state, at = splitmix(state)
        low, high = POOLS[pool % len(POOLS)]
        out.append(chr(low + at % (high - low + 1)))
    return "".join(out)


def write(name, about, encode, decode, control=frozenset()):
    ids, same = hashlib.sha256(), 0
    for number in range(STRINGS):
        encoded = encode(string(number))
        ids.update((",".join(map(str, encoded)) + "\n").encode())
        same |= (decode(encoded) == string(number)) << number
    # Text that spells a control token stays text in Skein, even where a package finds the token.
    cases = [{"text": text, "ids": encode(text), "decoded": decode(encode(text))} for text in TEXTS + [string(i) for i in range(32)] if not control & set(encode(text))]
    golden = {"about": about + "; made by tests/python/golden_tokenizers.py", "strings": STRINGS, "ids": ids.hexdigest(), "same": same.to_bytes(STRINGS // 8, "little").hex()}
    lines = ",\n".join("  " + json.dumps(case) for case in cases)
    head = json.dumps(golden, indent=1)[:-2]
    (GOLDEN / name).write_text(f"{head},\n \"cases\": [\n{lines}\n ]\n}}\n")
    print(name, ids.hexdigest()[:16])


def of_json(name, file, change=None):
    made = json.loads(file.read_text())
    if change:
        made.update(change)
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(made))
    tokenizer.encode_special_tokens = True
    control = {token["id"] for token in made["added_tokens"] if token["special"]}
    about = f"{file.relative_to(ROOT)}; Python package tokenizers {tokenizers.__version__}: encode(text, add_special_tokens=False) with encode_special_tokens True, decode"
    write(name, about, lambda text: tokenizer.encode(text, add_special_tokens=False).ids, lambda ids: tokenizer.decode(ids, skip_special_tokens=False), control)


def of_sentencepiece(name, model, options):
    path = GOLDEN / model
    if "--train" in sys.argv:
        usual = dict(model_type="bpe", normalization_rule_name="identity", remove_extra_whitespaces=False, num_threads=1, minloglevel=2)
        prefix = str(path.with_suffix("").relative_to(ROOT))
        sentencepiece.SentencePieceTrainer.train(input=str(TEXT.relative_to(ROOT)), model_prefix=prefix, **{**usual, **options})
        path.with_suffix(".vocab").unlink()
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    about = f"{path.relative_to(ROOT)}; Python package sentencepiece {sentencepiece.__version__}: encode(text), decode"
    write(name, about, lambda text: processor.encode(text), lambda ids: processor.decode(ids))


os.chdir(ROOT)
for model in ["llama", "qwen2", "gpt2", "bert"]:
    of_json(f"random-{model}.json", MODELS / model / "tokenizer.json")
of_json("random-bert-cased.json", MODELS / "bert" / "tokenizer.json", {"normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": False}})
boundary = GOLDEN / "boundary.tokenizer.json"
prefixed = json.loads((GOLDEN / "boundary-prefixed.json").read_text())
of_json("random-boundary.json", boundary)
of_json("random-boundary-prefixed.json", boundary, {key: prefixed[key] for key in ["normalizer", "pre_tokenizer", "decoder"]})
# How DeepSeek V3's tokenizer.json splits text, with a vocabulary that has tokens across the borders of other splittings.
of_json("random-deepseek-v3.json", MODELS / "qwen2" / "tokenizer.json", json.loads((GOLDEN / "deepseek-v3.json").read_text()))
of_sentencepiece("random-spm-bytes.json", "spm-bytes.model", dict(vocab_size=600, byte_fallback=True, user_defined_symbols=["<tool>", "▁▁", "▁▁▁▁"]))
of_sentencepiece(
    "random-spm-plain.json", "spm-plain.model",
    dict(vocab_size=400, add_dummy_prefix=False, character_coverage=0.999, pad_id=3, user_defined_symbols=["<tool>", "\n"]))
of_sentencepiece("random-spm-unigram.json", "spm-unigram.model", dict(
    vocab_size=600, model_type="unigram", byte_fallback=True, normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True, user_defined_symbols=["<tool>", "▁▁", "ab", "\u30a2"]))
of_sentencepiece("random-spm-unigram-plain.json", "spm-unigram-plain.model", dict(
    vocab_size=400, model_type="unigram", add_dummy_prefix=False, character_coverage=0.999, pad_id=3, user_defined_symbols=["<tool>", "\n"]))
# A table of replacements that overlap, some with nothing, some with spaces, in a model that merges.
RULES = [("ﬁ", "fi"), ("ﬁ ", "F"), ("ab", "x y"), ("abc", " "), ("é", "e"), ("e\u0301", "e"), ("\u00a0", " "), ("\u3000", "  "), ("\u200b", ""), ("日本", "Japan"), ("<t", "<")]
table = GOLDEN.relative_to(ROOT) / "rules.tsv"
points = lambda text: " ".join(f"{ord(c):X}" for c in text)
table.write_text("".join(f"{points(a)}\t{points(b)}\n" for a, b in RULES))
of_sentencepiece("random-spm-table.json", "spm-table.model", dict(
    vocab_size=500, normalization_rule_name="", normalization_rule_tsv=str(table), remove_extra_whitespaces=True, byte_fallback=True, user_defined_symbols=["<tool>"]))
table.unlink()


def fields(data):
    """The fields of a protocol buffer that are bytes: their numbers and contents."""
    def number(at):
        value = shift = 0
        while True:
            byte = data[at]
            value, shift, at = value | (byte & 0x7F) << shift, shift + 7, at + 1
            if byte < 0x80:
                return value, at

    at = 0
    while at < len(data):
        key, at = number(at)
        if key & 7 == 2:
            length, at = number(at)
            yield key >> 3, data[at:at + length]
            at += length
        elif key & 7 == 0:
            _, at = number(at)
        else:
            at += {1: 8, 5: 4}[key & 7]


# The tokenizer.json that transformers makes of a unigram model, with the table of the model that has a small one.
pieces = sentencepiece.SentencePieceProcessor(model_file=str(GOLDEN / "spm-unigram.model"))
normalizer = next(content for number, content in fields((GOLDEN / "spm-table.model").read_bytes()) if number == 3)
charsmap = next(content for number, content in fields(normalizer) if number == 2)
added = [{"id": i, "content": pieces.id_to_piece(i), "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": i < 3} for i in range(4)]
space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
made = {
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
    "normalizer": {"type": "Sequence", "normalizers": [
        {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()}, {"type": "NFKC"}, {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}]},
    "pre_tokenizer": space, "post_processor": None, "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, space]},
    "model": {"type": "Unigram", "unk_id": 0, "vocab": [[pieces.id_to_piece(i), pieces.get_score(i)] for i in range(pieces.get_piece_size())], "byte_fallback": True},
}
(GOLDEN / "unigram.tokenizer.json").write_text(json.dumps(made, ensure_ascii=False))
of_json("random-unigram-json.json", GOLDEN / "unigram.tokenizer.json")
