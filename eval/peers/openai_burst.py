"""Sends many chat completions at once through the public `openai` client, as it comes: its retries and its timeouts.

Usage: openai_burst.py BASE_URL MODEL COUNT MAX_TOKENS

Prints one JSON line: {"openai": VERSION, "answered": N, "failed": {NAME: N}, "retries": N, "seconds": S}.
"""

import asyncio
import collections
import json
import sys
import time

import openai

base_url, model, count, max_tokens = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])


async def one(client, number, failed):
    messages = [{"role": "user", "content": f"Tell me about harbour number {number}."}]
    try:
        raw = await client.chat.completions.with_raw_response.create(
            model=model, messages=messages, max_tokens=max_tokens
        )
    except openai.OpenAIError as error:
        failed[type(error).__name__] += 1
        return 0, 0
    answer = raw.parse()
    return int(answer.choices[0].finish_reason in ("stop", "length")), raw.retries_taken


async def burst():
    client, failed = openai.AsyncOpenAI(base_url=base_url, api_key="none"), collections.Counter()
    begun = time.monotonic()
    ended = await asyncio.gather(*(one(client, number, failed) for number in range(count)))
    seconds = time.monotonic() - begun
    answered, retries = (sum(column) for column in zip(*ended))
    return {
        "openai": openai.__version__, "answered": answered, "failed": failed, "retries": retries, "seconds": seconds
    }


print(json.dumps(asyncio.run(burst())))
