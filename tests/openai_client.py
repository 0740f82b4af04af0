"""Drives a running server with the public `openai` client. Called by tests/http.rs:

    python openai_client.py BASE_URL KEY MODEL QUESTION ANSWER

Ends with exit code 0 and the line `ok`, or with the traceback of the first expectation that does not hold.
"""

import asyncio
import math
import os
import re
import sys

try:
    import openai
except ImportError as error:
    sys.exit(f"the public `openai` package cannot be imported by {sys.executable}: {error}")

base_url, key, model, question, answer = sys.argv[1:]
client = openai.OpenAI(base_url=base_url, api_key=key, max_retries=0, timeout=120)
examples = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "examples")
asked = [{"role": "user", "content": question}]
quire = {"quire": {"collection": "default"}}


def refused(kind, status, param, **arguments):
    """The request must be refused with this exception, status and parameter."""
    arguments = {"model": model, "messages": asked} | arguments
    try:
        client.chat.completions.create(**arguments)
    except kind as error:
        assert error.status_code == status, error
        assert error.param == param, (error.param, param, str(error))
        return error
    raise AssertionError(f"{kind.__name__} expected for {param}")


def models():
    raw = client.models.with_raw_response.list(extra_headers={"X-Request-Id": "mine-1"})
    assert raw.headers["x-request-id"] == "mine-1", raw.headers
    names = [m.id for m in client.models.list()]
    assert names == [model], names
    assert client.models.retrieve(model).owned_by == "quire"
    try:
        client.models.retrieve("another")
        raise AssertionError("an unknown model was found")
    except openai.NotFoundError as error:
        assert error.code == "model_not_found", error


def whole():
    done = client.chat.completions.create(model=model, messages=asked, max_tokens=32, extra_body=quire)
    assert done.object == "chat.completion" and done.model == model and done.id.startswith("chatcmpl-")
    assert done._request_id.startswith("req-"), done._request_id
    choice = done.choices[0]
    assert choice.message.role == "assistant" and choice.finish_reason == "stop", choice
    assert choice.message.content.strip() == answer, (choice.message.content, answer)
    usage = done.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens, usage
    assert 0 < usage.prompt_tokens_details.cached_tokens < usage.prompt_tokens, usage
    extra = done.model_extra["quire"]
    stats = extra["stats"]
    assert stats["reused_tokens"] == usage.prompt_tokens_details.cached_tokens, stats
    assert stats["recomputed_tokens"] > 0 and stats["chunks_computed"] == 0 and stats["ttft_seconds"] > 0, stats
    assert any(c["contains_answer"] for c in extra["citations"]), extra["citations"]
    for c in extra["citations"]:
        # The name alone: folders of the server are its own.
        assert os.path.basename(c["document"]) == c["document"] and c["document_id"].startswith("doc_"), c
        with open(os.path.join(examples, c["document"]), encoding="utf-8", newline="") as file:
            text = file.read()
        assert text[c["span"]["start"] : c["span"]["end"]] == c["passage"], c
    annotated(choice.message, extra["citations"])
    return choice.message.content, next(c for c in extra["citations"] if c["contains_answer"])


def annotated(message, citations):
    """Every citation is an annotation of the message, in the same order, with the place that it supports."""
    assert len(message.annotations) == len(citations) > 0, (message, citations)
    for index, (annotation, citation) in enumerate(zip(message.annotations, citations)):
        extra = annotation.model_extra
        assert extra["index"] == index and extra["span"] == citation["span"], (annotation, citation)
        if annotation.type == "url_citation":
            place = annotation.url_citation
            assert (place.url, place.title) == (citation["url"], citation["title"]), (annotation, citation)
            start, end = place.start_index, place.end_index
        else:
            assert annotation.type == "file_citation", annotation
            given = citation.get("file_id") or citation.get("document_id") or citation.get("id") or citation["document"]
            assert (extra["file_id"], extra["filename"]) == (given, citation["document"]), (annotation, citation)
            start, end = extra["start_index"], extra["end_index"]
        span = citation.get("answer_span") or {"start": 0, "end": len(message.content)}
        assert (start, end) == (span["start"], span["end"]), (annotation, citation)
        assert extra["contains_answer"] == citation["contains_answer"], (annotation, citation)


def streamed(expected):
    text, reason, usage, extra, roles = "", None, None, None, []
    stream = client.chat.completions.create(
        model=model, messages=asked, max_tokens=32, stream=True, stream_options={"include_usage": True}, extra_body=quire
    )
    for chunk in stream:
        assert chunk.object == "chat.completion.chunk", chunk
        assert usage is None, "nothing comes after the usage"
        if not chunk.choices:
            usage = chunk.usage
            continue
        assert chunk.usage is None, chunk
        assert reason is None, "nothing comes after the reason but the usage"
        choice = chunk.choices[0]
        roles += [choice.delta.role] if choice.delta.role else []
        text += choice.delta.content or ""
        reason = choice.finish_reason
        extra = chunk.model_extra.get("quire", extra)
    assert (text, reason, roles) == (expected, "stop", ["assistant"]), (text, expected, reason, roles)
    assert usage.prompt_tokens_details.cached_tokens > 0 and usage.completion_tokens > 0, usage
    assert extra["citations"], extra
    gathered(quire)


def gathered(body):
    """The client puts annotations together from a stream, too."""
    with client.chat.completions.stream(model=model, messages=asked, max_tokens=32, extra_body=body) as stream:
        chunks = [event.chunk for event in stream if event.type == "chunk"]
        message = stream.get_final_completion().choices[0].message
    annotated(message, chunks[-1].model_extra["quire"]["citations"])


def passages(expected, citation):
    """Passages that come with the question, from whoever searches elsewhere."""

    def ask(passages, **more):
        body = {"quire": {"passages": passages}}
        done = client.chat.completions.create(model=model, messages=asked, max_tokens=32, extra_body=body, **more)
        return done.choices[0].message, done.model_extra["quire"], done.usage

    with open(os.path.join(examples, citation["document"]), encoding="utf-8", newline="") as file:
        document = file.read()
    # The same chunks as those of the collection: all are cached already.
    named = {"text": document, "id": "d-1", "filename": citation["document"], "metadata": {"page": 3}}
    message, extra, usage = ask([named])
    assert message.content.strip() == answer, message
    assert extra["stats"]["chunks_computed"] == 0 < usage.prompt_tokens_details.cached_tokens, extra["stats"]
    annotated(message, extra["citations"])
    for c in extra["citations"]:
        assert document[c["span"]["start"] : c["span"]["end"]] == c["passage"], c
        assert (c["id"], c["filename"], c["attributes"], "score" in c) == ("d-1", named["filename"], {"page": 3}, False), c
    # New texts are computed once. White space around a passage is none of it, and a repetition is left out.
    fresh = [
        {"text": f" {citation['passage']}\n", "title": "Locker", "url": "https://library.example/a"},
        "The ferry to Skerrick leaves at ten past four, unless the fog is thick.",
        {"text": "Nobody has counted the herons since the mill was sold.", "id": "h"},
    ]
    for computed in (2, 0):
        message, extra, _ = ask([*fresh, fresh[1]])
        assert message.content == expected, message
        assert extra["stats"]["chunks_computed"] == computed, extra["stats"]
        assert extra["notes"] == ["1 of 4 passages were left out: they repeat others"], extra["notes"]
        annotated(message, extra["citations"])
        assert [a.type for a in message.annotations] == ["url_citation", "file_citation", "file_citation"], message
        assert extra["citations"][0]["span"] == {"start": 1, "end": 1 + len(citation["passage"])}, extra["citations"]
    gathered({"quire": {"passages": fresh}})
    message, extra, _ = ask([])
    assert (message.annotations, extra["notes"]) == ([], ["no passage was given"]), (message, extra)
    bad = openai.BadRequestError
    for param, body in (
        ("quire.passages[1]", {"passages": ["a", " "]}),
        ("quire.passages[0].magic", {"passages": [{"text": "a", "magic": 1}]}),
        ("quire.passages", {"passages": ["a"], "collection": "default"}),
        ("quire.query", {"passages": ["a"], "query": "b"}),
    ):
        refused(bad, 400, param, extra_body={"quire": body})


def searching(expected):
    """Another text may be searched for than the one that asks, and what scores far below the best may be left out."""

    def ask(content, **more):
        body = {"quire": quire["quire"] | more}
        messages = [{"role": "user", "content": content}]
        done = client.chat.completions.create(model=model, messages=messages, max_tokens=32, extra_body=body)
        return done.choices[0].message, done.model_extra["quire"]

    places = lambda extra: [(c["document_id"], c["span"]["start"]) for c in extra["citations"]]
    _, there = ask(question)
    message, extra = ask("Where is that?", query=question)
    assert places(extra) == places(there), (extra, there)
    best = max(c["score"] for c in there["citations"])
    for threshold in (0.0, 0.5, 1.0):
        message, extra = ask(question, score_threshold=threshold)
        kept = [c["score"] for c in there["citations"] if c["score"] >= threshold * best]
        assert [c["score"] for c in extra["citations"]] == kept, (threshold, kept, extra)
        left = len(there["citations"]) - len(kept)
        assert len(extra["notes"]) == (left > 0) and all(n.startswith(f"{left} of ") for n in extra["notes"]), extra
    assert message.content == expected, message
    refused(openai.BadRequestError, 400, "quire.score_threshold", extra_body={"quire": quire["quire"] | {"score_threshold": 2}})


def decoding():
    """Strategies and blend modes of one request; everything computed anew gives the answer, too."""
    for more in (
        {"blend": "full-recompute"},
        {"strategy": "retrieval", "window": 64, "k": 4096, "ef": 4096, "index": "flat"},
        {"strategy": "retrieval", "window": 64, "k": 4096, "index": "hnsw"},
        {"ratio": 1.0},
    ):
        body = {"quire": quire["quire"] | more}
        done = client.chat.completions.create(model=model, messages=asked, max_tokens=32, extra_body=body)
        assert done.choices[0].message.content.strip() == answer, (more, done.choices[0].message.content)
        stats = done.model_extra["quire"]["stats"]
        if more.get("blend"):
            assert stats["reused_tokens"] == 0 and done.usage.prompt_tokens_details.cached_tokens == 0, stats
        if more.get("strategy"):
            # Short answers end before an index is ready: all cold keys are read then.
            assert stats["cold_keys"] > 0 and 0 < stats["scored_share"] <= 1, stats


def sampling(text):
    def ask(**more):
        arguments = {"model": model, "messages": asked, "extra_body": quire, "max_tokens": 8} | more
        return client.chat.completions.create(**arguments).choices[0]

    assert ask(max_tokens=1).finish_reason == "length"
    stop = text.strip()[2:4]
    cut = ask(stop=[stop], max_tokens=32)
    assert cut.finish_reason == "stop" and cut.message.content == text[: text.index(stop)], cut
    hot = {"temperature": 2, "top_p": 0.99, "max_tokens": 24, "extra_body": None}
    assert ask(seed=7, **hot).message.content == ask(seed=7, **hot).message.content
    contents = {ask(seed=seed, **hot).message.content for seed in range(8)}
    assert len(contents) > 1, contents
    parts = [{"role": "user", "content": [{"type": "text", "text": question}]}]
    assert ask(messages=parts, max_tokens=32).message.content == text
    plain = client.chat.completions.create(model=model, messages=asked, max_completion_tokens=4)
    assert plain.usage.completion_tokens <= 4 and plain.usage.prompt_tokens_details.cached_tokens == 0, plain.usage


def same_tokens(text, content):
    """The tokens' texts and their bytes are the text's."""
    assert "".join(token.token for token in content) == text, (text, content)
    assert bytes(byte for token in content for byte in token.bytes).decode() == text, (text, content)


def logprobs(text):
    create = client.chat.completions.create
    arguments = {"model": model, "messages": asked, "max_tokens": 32, "logprobs": True, "extra_body": quire}
    plain = create(**arguments).choices[0]
    assert plain.message.content == text, plain
    same_tokens(text, plain.logprobs.content)
    assert all(token.top_logprobs == [] for token in plain.logprobs.content), plain
    done = create(**arguments, top_logprobs=20).choices[0]
    same_tokens(text, done.logprobs.content)
    for token in done.logprobs.content:
        others = token.top_logprobs
        assert len(others) == 20 and [o.logprob for o in others] == sorted((o.logprob for o in others), reverse=True)
        assert sum(math.exp(other.logprob) for other in others) < 1.0001, others
        # Greedy: the token is the likeliest.
        assert (others[0].token, others[0].bytes, others[0].logprob) == (token.token, token.bytes, token.logprob), token
    whole = [(token.token, token.bytes) for token in done.logprobs.content]
    stream = create(**arguments, top_logprobs=20, stream=True)
    pieces = []
    for chunk in stream:
        choice = chunk.choices[0]
        content = choice.logprobs.content if choice.logprobs else []
        if choice.delta.content:
            same_tokens(choice.delta.content, content)
        pieces += content
    assert [(token.token, token.bytes) for token in pieces] == whole, (pieces, whole)
    # Drawn from all over the vocabulary: parts of characters and special tokens too; and a stop string within a token.
    for seed in range(4):
        hot = create(model=model, messages=asked, max_tokens=40, temperature=2, seed=seed, logprobs=True, top_logprobs=3,
                     logit_bias={str(byte): 6 for byte in range(150, 262)}).choices[0]
        assert "".join(token.token for token in hot.logprobs.content) == hot.message.content, hot
        spoken = bytes(byte for token in hot.logprobs.content for byte in token.bytes)
        assert spoken.decode(errors="replace") == hot.message.content, hot
        assert all(token.logprob <= 0 and len(token.top_logprobs) == 3 for token in hot.logprobs.content), hot
    stop = text.strip()[1:3]
    cut = create(**arguments, stop=stop).choices[0]
    assert cut.message.content == text[: text.index(stop)], cut
    same_tokens(cut.message.content, cut.logprobs.content)


def many(expected):
    """Several answers to one prompt."""
    create = client.chat.completions.create
    alike = create(model=model, messages=asked, max_tokens=32, n=3, extra_body=quire)
    assert [c.index for c in alike.choices] == [0, 1, 2] and {c.message.content for c in alike.choices} == {expected}
    alone = create(model=model, messages=asked, max_tokens=32, extra_body=quire).usage
    assert alike.usage.prompt_tokens == alone.prompt_tokens, (alike.usage, alone)
    assert alike.usage.completion_tokens == 3 * alone.completion_tokens, (alike.usage, alone)
    hot = {"model": model, "messages": asked, "max_tokens": 24, "temperature": 2, "seed": 5, "n": 8}
    contents = [choice.message.content for choice in create(**hot).choices]
    assert len(set(contents)) > 1, contents
    # How many answers a step computes decides the last bits of logits on CPUs with matrix tiles: drawn answers with equal seeds
    # begin alike, and may part later.
    begin = lambda text: text[:4]
    for choice in (0, 7):
        alone = create(**hot | {"n": 1, "seed": 5 + choice}).choices[0].message.content
        assert begin(contents[choice]) == begin(alone), (contents, alone)
    texts, reasons, usage = [""] * 8, [None] * 8, None
    for chunk in create(**hot, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert [begin(text) for text in texts] == [begin(text) for text in contents], (texts, contents)
    assert None not in reasons and usage.completion_tokens > 24, (texts, contents, reasons, usage)


def accepted(text):
    """Fields that ask for nothing, as clients and their histories send them."""
    def same(**more):
        done = client.chat.completions.create(**({"model": model, "messages": asked, "extra_body": quire} | more))
        assert done.choices[0].message.content == text, (more, done.choices[0].message.content)
        return done.choices[0].message

    for more in (
        {"metadata": {"a": "b"}}, {"prompt_cache_key": "k"}, {"parallel_tool_calls": False}, {"tools": []},
        {"tool_choice": "auto"}, {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none"},
        {"function_call": "none"}, {"store": False}, {"service_tier": "default"}, {"n": 1}, {"user": "u"},
        {"response_format": {"type": "text"}}, {"logprobs": False}, {"max_tokens": -1}, {"max_tokens": None},
        {"top_logprobs": 0}, {"extra_body": quire | {"top_k": -1}}, {"extra_body": quire | {"model": None}},
        {"messages": [asked[0] | {"name": "Ada", "extra": "x"}]}, {"top_p": 0, "temperature": 2},
    ):
        message = same(**more)
    # Nothing about its length, and the text ends.
    with client.chat.completions.stream(model=model, messages=asked, extra_body=quire) as stream:
        assert stream.get_final_completion().choices[0].message.content == text
    # An answer as it came, sent back.
    history = [*asked, message, message.model_dump(), {"role": "assistant", "content": None}, *asked]
    client.chat.completions.create(model=model, messages=history, max_tokens=4)
    begun = [*asked, {"role": "assistant", "content": text[:2]}]
    rest = client.chat.completions.create(model=model, messages=begun, max_tokens=32, extra_body=quire).choices[0]
    assert text[:2] + rest.message.content == text, rest
    least = client.chat.completions.create(model=model, messages=asked, max_tokens=30, extra_body=quire | {"min_tokens": 25})
    assert least.usage.completion_tokens > 25, least.usage


def errors():
    bad = openai.BadRequestError
    refused(bad, 400, "n", n=1000)
    refused(bad, 400, "top_logprobs", top_logprobs=2)
    refused(bad, 400, "top_logprobs", logprobs=True, top_logprobs=21)
    refused(bad, 400, "seed", seed=2**63)
    refused(bad, 400, "stream_options", stream_options={"include_usage": False})
    refused(bad, 400, "messages", messages=[*asked, {"role": "assistant", "content": "a"}] + [{"role": "assistant", "content": "b"}])
    error = refused(bad, 400, "logit_bias", logit_bias={"x": 1, "-4": 1})
    assert "`x`" in str(error) and "`-4`" in str(error), error
    refused(bad, 400, "tools", tools=[{"type": "function", "function": {"name": "f"}}])
    refused(bad, 400, "response_format", response_format={"type": "json_object"})
    refused(bad, 400, "temperature", temperature=3)
    refused(bad, 400, "quire.magic", extra_body={"quire": {"magic": 1}})
    for words in (40000, 1_600_000):
        error = refused(bad, 400, "messages", messages=[{"role": "user", "content": "word " * words}])
        assert error.code == "context_length_exceeded" and "32768" in str(error), error
        assert any(int(number) > 32768 for number in re.findall(r"\d+", str(error))), error
    refused(bad, 400, "messages", messages=[{"role": "user", "content": " "}], extra_body=quire)
    huge = {"collection": "default", "strategy": "retrieval", "window": 64, "k": 10**15}
    refused(bad, 400, "quire.k", extra_body={"quire": huge})
    refused(openai.NotFoundError, 404, "model", model="another")
    refused(openai.NotFoundError, 404, "quire.collection", extra_body={"quire": {"collection": "absent"}})
    stranger = openai.OpenAI(base_url=base_url, api_key="wrong", max_retries=0)
    try:
        stranger.models.list()
        raise AssertionError("a wrong key was accepted")
    except openai.AuthenticationError as error:
        assert error.code == "invalid_api_key", error


async def together(expected):
    """Requests that run at the same time do not disturb one another."""
    many = openai.AsyncOpenAI(base_url=base_url, api_key=key, max_retries=0, timeout=120)
    create = many.chat.completions.create
    requests = [create(model=model, messages=asked, max_tokens=32, extra_body=quire) for _ in range(4)]
    for done in await asyncio.gather(*requests):
        assert done.choices[0].message.content == expected, done


models()
content, cited = whole()
streamed(content)
passages(content, cited)
searching(content)
decoding()
sampling(content)
logprobs(content)
many(content)
accepted(content)
errors()
asyncio.run(together(content))
print("ok")
