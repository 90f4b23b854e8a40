"""The official openai client's embeddings against a running server, compared with a fixture's expected.json.

usage: openai_embeddings.py URL MODEL EXPECTED
"""

import json
import math
import sys

import openai

URL, MODEL, EXPECTED = sys.argv[1:4]
client = openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0, timeout=300)
with open(EXPECTED) as file:
    TEXTS = json.load(file)["texts"]


def embed(inputs, **more):
    answer = client.embeddings.create(model=MODEL, input=inputs, **more)
    assert answer.object == "list" and answer.model == MODEL, answer
    assert [item.index for item in answer.data] == list(range(len(answer.data)))
    return [item.embedding for item in answer.data], answer.usage


def distance(a, b):
    assert len(a) == len(b), (len(a), len(b))
    return max(abs(x - y) for x, y in zip(a, b))


def refused(word, **more):
    try:
        client.embeddings.create(model=MODEL, **more)
    except openai.BadRequestError as error:
        assert word in error.message, (word, error.message)
        return
    raise AssertionError(f"{more} was not refused")


texts, expected = list(TEXTS), [value["mean_pooled_l2"] for value in TEXTS.values()]
# The client asks for base64 where it is not told otherwise, and decodes it.
vectors, usage = embed(texts)
assert all(distance(*pair) <= 1e-4 for pair in zip(vectors, expected))
assert distance(vectors[0], expected[1]) > 1e-2, "another text went unseen"
tokens = sum(len(value["input_ids"]) for value in TEXTS.values())
assert (usage.prompt_tokens, usage.total_tokens) == (tokens, tokens), usage

floats, _ = embed(texts, encoding_format="float")
assert all(distance(*pair) <= 1e-7 for pair in zip(floats, vectors))
ids, _ = embed([value["input_ids"] for value in TEXTS.values()])
assert ids == vectors
alone, _ = embed(TEXTS[texts[1]]["input_ids"])
assert alone == [vectors[1]]

# The first values, of length 1 again.
(cut,), _ = embed(texts[0], dimensions=16)
length = math.sqrt(sum(x * x for x in vectors[0][:16]))
assert distance(cut, [x / length for x in vectors[0][:16]]) <= 1e-6

refused("dimensions is 4096", input="a", dimensions=4096)
refused("encoding_format", input="a", encoding_format="int8")
refused("reads at most", input="word " * 1000)
refused("input", input=[])
