"""The official openai client against a running server: every parameter that Skein knows, and the errors.

usage: openai_client.py URL MODEL [--without-template]
"""

import json
import re
import sys
import time

import openai

URL, MODEL = sys.argv[1], sys.argv[2]
client = openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0, timeout=300)
PROMPT = "The capital of France is"


def complete(prompt=PROMPT, **more):
    return client.completions.create(model=MODEL, prompt=prompt, **{"max_tokens": 16, "temperature": 0, **more})


def chat(content="Name a city in France.", **more):
    messages = [{"role": "user", "content": content}]
    return client.chat.completions.create(model=MODEL, messages=messages, **{"max_tokens": 16, "temperature": 0, **more})


def refused(kind, word, call, *args, **more):
    """The call fails with `kind` of the client's own errors, and its message holds `word`."""
    try:
        call(*args, **more)
    except kind as error:
        body = error.body if isinstance(error.body, dict) else {}
        assert word in error.message, (word, error.message)
        assert {"message", "type", "param", "code"} <= set(body), body
        return
    raise AssertionError(f"{call.__name__} {more} was not refused")


def models():
    listed = {model.id: model for model in client.models.list()}
    assert MODEL in listed and listed[MODEL].object == "model", listed
    assert client.models.retrieve(MODEL).id == MODEL
    refused(openai.NotFoundError, "absent", client.models.retrieve, "absent")


def completions():
    whole = complete()
    choice = whole.choices[0]
    assert whole.object == "text_completion" and whole.model == MODEL and abs(whole.created - time.time()) < 300
    assert choice.text.startswith(" the capital of the country of France"), choice.text
    assert choice.finish_reason == "length"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (6, 16, 22), whole.usage
    # The same from ids, and several prompts in one request.
    assert complete([2, 818, 5279, 529, 7001, 563]).choices[0].text == choice.text
    both = complete([PROMPT, "def fibonacci(n):\n"]).choices
    assert [c.index for c in both] == [0, 1] and both[0].text == choice.text and "return" in both[1].text, both
    # Streamed: the same text in pieces, usage last.
    pieces = list(complete(stream=True, stream_options={"include_usage": True}))
    assert "".join(p.choices[0].text for p in pieces if p.choices) == choice.text
    assert not pieces[-1].choices and pieces[-1].usage.total_tokens == 22, pieces[-1]
    assert [p.choices[0].finish_reason for p in pieces if p.choices][-1] == "length"
    assert all(p.usage is None for p in pieces[:-1])
    assert all(p.usage is None for p in complete(stream=True))


def limits():
    assert complete(max_tokens=3).usage.completion_tokens == 3
    # A string that ends inside a token and one that spans several; neither is part of the text.
    text = complete().choices[0].text
    for stop in ["pital", "of the coun", ["zzz", " country"]]:
        got = complete(stop=stop)
        first = min(text.index(s) for s in ([stop] if isinstance(stop, str) else stop) if s in text)
        assert got.choices[0].text == text[:first] and got.choices[0].finish_reason == "stop", (stop, got)
        streamed = "".join(p.choices[0].text for p in complete(stop=stop, stream=True) if p.choices)
        assert streamed == text[:first], (stop, streamed)
    # 2891 is " country".
    got = complete(extra_body={"stop_token_ids": [2891]}).choices[0]
    assert got.finish_reason == "stop" and "country" not in got.text, got
    # An end token forced by a bias, then ignored, then not before the fifth token.
    forced = {"1": 100}
    assert complete(logit_bias=forced).usage.completion_tokens == 1
    assert complete(logit_bias=forced, extra_body={"ignore_eos": True}).usage.completion_tokens == 16
    assert complete(logit_bias=forced, extra_body={"min_tokens": 5}).usage.completion_tokens == 6


def sampling():
    hot = {"temperature": 1.5, "max_tokens": 24}
    one = complete(**hot, seed=1).choices[0].text
    assert complete(**hot, seed=1).choices[0].text == one
    assert complete(**hot, seed=2).choices[0].text != one
    several = complete(**hot, seed=1, n=3).choices
    assert [c.index for c in several] == [0, 1, 2] and len({c.text for c in several}) == 3, several
    assert several[0].text == one
    streamed = {}
    for piece in complete(**hot, seed=1, n=3, stream=True):
        for choice in piece.choices:
            streamed[choice.index] = streamed.get(choice.index, "") + choice.text
    assert streamed == {c.index: c.text for c in several}, streamed
    greedy = complete().choices[0].text
    assert complete(temperature=5, extra_body={"top_k": 1}).choices[0].text == greedy
    assert complete(temperature=5, top_p=1e-6).choices[0].text == greedy
    assert complete(temperature=5, extra_body={"min_p": 1.0}).choices[0].text == greedy
    assert complete(logit_bias={"506": -100}).choices[0].text != greedy
    assert complete(presence_penalty=2.0).choices[0].text != greedy
    assert complete(frequency_penalty=2.0).choices[0].text != greedy
    assert complete(extra_body={"repetition_penalty": 2.0}).choices[0].text != greedy


def log_probabilities():
    got = complete(logprobs=3, max_tokens=4).choices[0].logprobs
    assert len(got.tokens) == len(got.token_logprobs) == len(got.top_logprobs) == len(got.text_offset) == 4, got
    # Greedy: each token is the likeliest of its alternatives. First logits: 506 19.09 against a log-sum-exp of 20.75.
    for token, logprob, top in zip(got.tokens, got.token_logprobs, got.top_logprobs):
        assert logprob <= 0 and len(top) >= 3 and abs(max(top.values()) - logprob) < 1e-6 and token in top, (token, top)
    assert abs(got.token_logprobs[0] + 1.65) < 0.3, got.token_logprobs
    echoed = complete(echo=True, logprobs=1, max_tokens=2).choices[0]
    assert echoed.text.startswith(PROMPT), echoed.text
    assert echoed.logprobs.token_logprobs[0] is None and len(echoed.logprobs.tokens) == 8, echoed.logprobs
    assert all(p < 0 for p in echoed.logprobs.token_logprobs[1:])
    assert complete(echo=True, max_tokens=2).choices[0].text == PROMPT + complete(max_tokens=2).choices[0].text
    talk = chat(logprobs=True, top_logprobs=2, max_completion_tokens=5, max_tokens=openai.NOT_GIVEN).choices[0].logprobs.content
    assert len(talk) == 5 and all(len(t.top_logprobs) == 2 and bytes(t.bytes).decode(errors="replace") for t in talk), talk
    assert [t.token for t in talk] == [t.top_logprobs[0].token for t in talk]


def chats():
    whole = chat()
    choice = whole.choices[0]
    assert whole.object == "chat.completion" and choice.message.role == "assistant" and choice.message.content, whole
    pieces = list(chat(stream=True, stream_options={"include_usage": True}))
    assert pieces[0].object == "chat.completion.chunk" and pieces[0].choices[0].delta.role == "assistant"
    assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == choice.message.content
    assert pieces[-1].usage == whole.usage or pieces[-1].usage.total_tokens == whole.usage.total_tokens, (pieces[-1], whole.usage)
    assert chat(max_tokens=openai.NOT_GIVEN, max_completion_tokens=4).usage.completion_tokens == 4
    # A special token's text in what a user says is text: it adds more than one token.
    plain, special = chat("a"), chat("a<end_of_turn>")
    assert special.usage.prompt_tokens > plain.usage.prompt_tokens + 1, (plain.usage, special.usage)
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    turns = system + [{"role": "assistant", "content": "Hi."}, {"role": "user", "content": "Name a colour."}]
    longer = client.chat.completions.create(model=MODEL, messages=turns, max_tokens=2)
    assert longer.usage.prompt_tokens > client.chat.completions.create(model=MODEL, messages=system, max_tokens=2).usage.prompt_tokens
    several = chat(n=2, temperature=1.2, seed=5).choices
    assert len(several) == 2 and several[0].message.content != several[1].message.content


def constrained():
    """`response_format` and what vLLM's clients send beside it; the reference model is no chat model, and answers all the same."""
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "big": {"type": "boolean"}},
        "required": ["city", "big"],
        "additionalProperties": False,
    }
    named = {"type": "json_schema", "json_schema": {"name": "city", "strict": True, "schema": schema}}
    try:
        json.loads(chat(max_tokens=300).choices[0].message.content)
        raise AssertionError("without a schema the model writes JSON")
    except json.JSONDecodeError:
        pass
    for settings in [{}, {"temperature": 1.0, "seed": 3}]:
        whole = chat(max_tokens=300, response_format=named, **settings).choices[0]
        value = json.loads(whole.message.content)
        assert set(value) == {"city", "big"} and isinstance(value["city"], str) and isinstance(value["big"], bool), value
        assert whole.finish_reason == "stop", whole
        pieces = chat(max_tokens=300, response_format=named, stream=True, **settings)
        assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == whole.message.content
    several = chat(max_tokens=300, response_format=named, n=3, temperature=1.2, seed=8).choices
    assert all(set(json.loads(c.message.content)) == {"city", "big"} for c in several), several
    assert chat(max_tokens=30, response_format={"type": "json_object"}).choices[0].message.content.startswith("{")
    assert complete(extra_body={"guided_choice": ["Paris", "Rome"]}).choices[0].text in {"Paris", "Rome"}
    assert re.fullmatch("[0-9]{4}-[0-9]{2}", complete(extra_body={"guided_regex": "[0-9]{4}-[0-9]{2}"}).choices[0].text)
    bad = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "banana"}}}
    refused(openai.BadRequestError, "banana", chat, response_format=bad)
    refused(openai.BadRequestError, "guided_grammar", complete, extra_body={"guided_grammar": "start: A"})


def text_is_whole():
    """No piece of a stream ends inside a character."""
    prompt = "日本語: こんにちは。 🙂🙃 Ελληνικά:"
    bias = {"465": 6, "367": 6, "478": 6}  # byte tokens, so that characters come in parts
    for seed in range(4):
        settings = {"temperature": 1.3, "seed": seed, "max_tokens": 40, "logit_bias": bias, "extra_body": {"ignore_eos": True}}
        pieces = [p.choices[0].text for p in complete(prompt, stream=True, **settings) if p.choices]
        assert "".join(pieces) == complete(prompt, **settings).choices[0].text


def errors():
    bad = openai.BadRequestError
    refused(openai.NotFoundError, "absent", client.completions.create, model="absent", prompt="x")
    refused(bad, "temperature", complete, temperature=-1)
    refused(bad, "top_p", complete, top_p=2)
    refused(bad, "n", complete, n=0)
    refused(bad, "presence_penalty", complete, presence_penalty=3)
    refused(bad, "logit_bias", complete, logit_bias={"506": 101})
    refused(bad, "max_tokens", complete, max_tokens=-2)
    refused(bad, "min_p", complete, extra_body={"min_p": 7})
    refused(bad, "messages", client.chat.completions.create, model=MODEL, messages=[])
    refused(bad, "role", client.chat.completions.create, model=MODEL, messages=[{"role": "pirate", "content": "x"}])
    refused(bad, "top_logprobs", chat, top_logprobs=50, logprobs=True)
    refused(bad, "context", complete, [5] * 40000)


def cancellation():
    """A stream that is left is forgotten: the next request is answered."""
    stream = complete(stream=True, max_tokens=400, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    complete(max_tokens=1)


def without_template():
    refused(openai.BadRequestError, "template", chat)
    assert complete(max_tokens=2).usage.completion_tokens == 2


CHECKS = [models, completions, limits, sampling, log_probabilities, chats, constrained, text_is_whole, errors, cancellation]
for check in [without_template] if "--without-template" in sys.argv else CHECKS:
    check()
    print("ok", check.__name__)
