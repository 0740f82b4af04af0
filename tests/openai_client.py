"""Drives a running server with the public `openai` client. Called by tests/http.rs:

    python openai_client.py BASE_URL KEY MODEL QUESTION ANSWER

Ends with exit code 0 and the line `ok`, or with the traceback of the first expectation that does not hold.
"""

import asyncio
import os
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
        assert os.path.basename(c["document"]) == c["document"] and c["document_id"].startswith("doc-"), c
        with open(os.path.join(examples, c["document"]), encoding="utf-8", newline="") as file:
            text = file.read()
        assert text[c["span"]["start"] : c["span"]["end"]] == c["passage"], c
    return choice.message.content


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


def errors():
    bad = openai.BadRequestError
    refused(bad, 400, "n", n=2)
    refused(bad, 400, "logprobs", logprobs=True)
    refused(bad, 400, "tools", tools=[{"type": "function", "function": {"name": "f"}}])
    refused(bad, 400, "response_format", response_format={"type": "json_object"})
    refused(bad, 400, "temperature", temperature=3)
    refused(bad, 400, "quire.magic", extra_body={"quire": {"magic": 1}})
    refused(bad, 400, "messages", messages=[{"role": "user", "content": "word " * 40000}])
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
content = whole()
streamed(content)
decoding()
sampling(content)
errors()
asyncio.run(together(content))
print("ok")
