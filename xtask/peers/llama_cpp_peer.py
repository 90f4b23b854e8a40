"""llama-cpp-python measured as Skein measures itself: speed per test, or perplexity. One JSON object a line on stdout.

usage: llama_cpp_peer.py bench MODEL --threads N --tests pp512,tg128,batch8
       llama_cpp_peer.py ppl MODEL TEXT --chunks N
"""

import argparse
import json
import os
import sys
import time

import llama_cpp as lc
import numpy as np

# Its messages go to stderr, whatever they are.
STDOUT = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


@lc.llama_log_callback
def quiet(level, text, data):
    if level == 4:  # GGML_LOG_LEVEL_ERROR
        sys.stderr.write(text.decode(errors="replace"))


def say(**result):
    print(json.dumps(result), file=STDOUT, flush=True)


class Model:
    def __init__(self, path):
        lc.llama_backend_init()
        self.model = lc.llama_model_load_from_file(path.encode(), lc.llama_model_default_params())
        if not self.model:
            sys.exit(f"llama.cpp cannot load {path}")
        self.vocab = lc.llama_model_get_vocab(self.model)
        self.size = lc.llama_vocab_n_tokens(self.vocab)

    def context(self, tokens, threads, sequences=1):
        params = lc.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = tokens, min(tokens, 2048), 512
        params.n_threads = params.n_threads_batch = threads
        params.n_seq_max = sequences
        params.kv_unified = True
        context = lc.llama_init_from_model(self.model, params)
        if not context:
            sys.exit("llama.cpp cannot make a context")
        return context


class Batch:
    """Entries are (token, position, sequence, wants logits)."""

    def __init__(self, capacity):
        self.batch = lc.llama_batch_init(capacity, 0, 1)

    def decode(self, context, entries):
        b = self.batch
        b.n_tokens = len(entries)
        for i, (token, position, sequence, logits) in enumerate(entries):
            b.token[i], b.pos[i], b.n_seq_id[i], b.logits[i] = token, position, 1, logits
            b.seq_id[i][0] = sequence
        code = lc.llama_decode(context, b)
        if code != 0:
            sys.exit(f"llama_decode: {code}")


def clear(context):
    lc.llama_memory_clear(lc.llama_get_memory(context), True)


def prompt(model, n):
    return [2 + (i * 7919) % (model.size - 2) for i in range(n)]


def bench(model, threads, test):
    if test.startswith("pp"):
        n = int(test[2:])
        context, batch = model.context(max(n, 512), threads), Batch(n)
        ids = prompt(model, n)
        work, tokens = lambda: batch.decode(context, [(t, i, 0, i == n - 1) for i, t in enumerate(ids)]), n
    elif test.startswith("tg"):
        n, _, depth = test[2:].partition("@d")
        n, depth = int(n), int(depth or 0)
        context, batch = model.context(n + depth + 16, threads), Batch(max(depth, 1))
        before = [(t, i, 0, False) for i, t in enumerate(prompt(model, depth))]

        def work():
            for i in range(n):
                batch.decode(context, [(100 + i, depth + i, 0, True)])

        tokens = n
    elif test.startswith("batch"):
        sequences = int(test[5:])
        steps = 16 if sequences == 32 else 32
        context, batch = model.context(sequences * (steps + 16), threads, sequences), Batch(sequences)

        def work():
            for step in range(steps):
                batch.decode(context, [(100 + step, step + 1, s, True) for s in range(sequences)])

        tokens = sequences * steps
    else:
        sys.exit(f"unknown test {test}")

    def prepare():
        clear(context)
        if test.startswith("tg") and before:
            batch.decode(context, before)
        if test.startswith("batch"):
            batch.decode(context, [(50 + s, 0, s, False) for s in range(sequences)])
        lc.llama_synchronize(context)

    rates = []
    for attempt in range(4):
        prepare()
        began = time.perf_counter()
        work()
        lc.llama_synchronize(context)
        if attempt > 0:
            rates.append(tokens / (time.perf_counter() - began))
    lc.llama_free(context)
    rates.sort()
    say(test=test, threads=threads, tok_s=rates[len(rates) // 2], min=rates[0], max=rates[-1])


def ppl(model, path, chunks, size=512):
    with open(path, "rb") as file:
        text = file.read()
    ids = (lc.llama_token * (len(text) + 16))()
    count = lc.llama_tokenize(model.vocab, text, len(text), ids, len(ids), True, False)
    bos = lc.llama_vocab_bos(model.vocab)
    context, batch = model.context(size, os.cpu_count()), Batch(size)
    loss, scored = 0.0, 0
    for chunk in range(min(chunks, count // size)):
        tokens = [bos] + list(ids[chunk * size + 1 : (chunk + 1) * size])
        clear(context)
        half = size // 2
        batch.decode(context, [(t, i, 0, half <= i < size - 1) for i, t in enumerate(tokens)])
        for i in range(half, size - 1):
            logits = np.ctypeslib.as_array(lc.llama_get_logits_ith(context, i), (model.size,)).astype(np.float64)
            top = logits.max()
            loss += top + np.log(np.exp(logits - top).sum()) - logits[tokens[i + 1]]
            scored += 1
    say(ppl=float(np.exp(loss / scored)), tokens=scored, chunks=min(chunks, count // size), ids=count)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["bench", "ppl"])
    parser.add_argument("model")
    parser.add_argument("text", nargs="?")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--tests", default="pp512,tg128")
    parser.add_argument("--chunks", type=int, default=8)
    args = parser.parse_args()
    lc.llama_log_set(quiet, None)
    model = Model(args.model)
    if args.what == "ppl":
        ppl(model, args.text, args.chunks)
    else:
        for test in args.tests.split(","):
            bench(model, args.threads, test)


main()
