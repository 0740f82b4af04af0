"""Drives files and vector stores of a running server with the public `openai` client. Called by tests/vector_stores.rs:

    python vector_stores_client.py BASE_URL KEY MODEL QUESTION ANSWER DOCUMENT OTHER_DOCUMENT

Ends with exit code 0 and the line `ok`, or with the traceback of the first expectation that does not hold.
"""

import io
import os
import sys
import time

import openai

base_url, key, model, question, answer, document, other = sys.argv[1:]
client = openai.OpenAI(base_url=base_url, api_key=key, max_retries=0, timeout=120)
stores = client.vector_stores
texts = {}
for path in (document, other):
    with open(path, encoding="utf-8", newline="") as file:
        texts[path] = file.read()


def refused(kind, param, call, *arguments, **named):
    """The call must be refused with this exception and parameter."""
    try:
        call(*arguments, **named)
    except kind as error:
        assert error.param == param, (error.param, param, str(error))
        return error
    raise AssertionError(f"{kind.__name__} expected for {param}")


def upload(name, content, **more):
    content = content if isinstance(content, bytes) else content.encode()
    return client.files.create(file=(name, io.BytesIO(content)), purpose="assistants", **more)


def uploaded(listed):
    """The ids of files that were uploaded: documents that were ingested are files, too."""
    return [file.id for file in listed if not file.id.startswith("doc_")]


def files():
    with open(document, "rb") as file:
        made = client.files.create(file=file, purpose="assistants")
    assert made.id.startswith("file-") and made.object == "file" and made.purpose == "assistants", made
    assert made.filename == os.path.basename(document) and made.bytes == os.path.getsize(document), made
    assert made.expires_at is None and abs(made.created_at - time.time()) < 60, made
    assert client.files.retrieve(made.id) == made
    assert client.files.content(made.id).read() == texts[document].encode()
    large = os.urandom(3 << 20)
    kept = client.files.create(
        file=("../../etc/passwd", large), purpose="user_data", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert kept.filename == "passwd" and kept.expires_at == kept.created_at + 3600, kept
    assert client.files.content(kept.id).read() == large
    # Page by page, in both directions, and by purpose.
    more = [upload(f"{number}.txt", f"text {number}") for number in range(5)]
    expected = [made.id, kept.id, *(file.id for file in more)]
    assert uploaded(client.files.list(limit=2, order="asc")) == expected
    assert uploaded(client.files.list(limit=3)) == expected[::-1]
    assert [file.id for file in client.files.list(purpose="user_data")] == [kept.id]
    page = client.files.list(limit=2, order="asc", after=expected[2])
    assert [file.id for file in page.data] == expected[3:5] and page.has_more, page
    page = client.files.list(extra_query={"before": expected[3], "limit": 2, "order": "asc"})
    assert [file.id for file in page.data] == expected[1:3] and page.has_more, page
    assert (page.first_id, page.last_id) == (expected[1], expected[2]), page
    # Everything is deleted while it is listed.
    for file in client.files.list(limit=2):
        if file.id != made.id and not file.id.startswith("doc_"):
            assert client.files.delete(file.id).deleted
    assert uploaded(client.files.list()) == [made.id]
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        refused(openai.NotFoundError, "file_id", call, kept.id)
    bad = openai.BadRequestError
    refused(bad, "purpose", client.files.create, file=("a.txt", b"x"), purpose="fine-tune")
    refused(bad, "file", upload, "empty.txt", b"")
    refused(bad, "expires_after.seconds", upload, "a.txt", b"x", expires_after={"anchor": "created_at", "seconds": 5})
    refused(bad, "magic", upload, "a.txt", b"x", extra_body={"magic": "1"})
    refused(bad, "limit", client.files.list, limit=0)
    refused(bad, "magic", client.files.list, extra_query={"magic": 1})
    error = refused(openai.APIStatusError, "file", upload, "huge.txt", b"x" * (9 << 20))
    assert error.status_code == 413 and error.code == "file_too_large", error
    assert uploaded(client.files.list()) == [made.id]
    return made


def made_and_changed():
    store = stores.create(name="Notes", metadata={"a": "b"}, expires_after={"anchor": "last_active_at", "days": 7},
                          description="What was noted")
    assert store.id.startswith("vs_") and store.object == "vector_store" and store.name == "Notes", store
    assert store.status == "completed" and store.file_counts.total == 0 and store.usage_bytes == 0, store
    assert store.metadata == {"a": "b"} and store.expires_after.days == 7, store
    assert store.expires_at == store.last_active_at + 7 * 86400, store
    assert stores.retrieve(store.id) == store
    changed = stores.update(store.id, name="Others", metadata={"c": "d"}, expires_after=None)
    assert (changed.name, changed.metadata, changed.expires_after, changed.expires_at) == ("Others", {"c": "d"}, None, None)
    assert stores.update(store.id, metadata=None).metadata == {}
    second = stores.create()
    assert [s.id for s in stores.list(limit=1)][:2] == [second.id, store.id]
    assert stores.delete(second.id).deleted
    refused(openai.NotFoundError, "vector_store_id", stores.retrieve, second.id)
    bad = openai.BadRequestError
    refused(bad, "metadata.a", stores.create, metadata={"a": 1})
    refused(bad, "expires_after.days", stores.create, expires_after={"anchor": "last_active_at", "days": 400})
    refused(openai.NotFoundError, "file_ids[0]", stores.create, file_ids=["file-absent"])
    refused(bad, "magic", stores.create, extra_body={"magic": 1})
    return store


def attached(store, file):
    done = stores.files.create_and_poll(file.id, vector_store_id=store.id, attributes={"kind": "tale", "year": 1851},
                                        poll_interval_ms=50)
    assert (done.id, done.vector_store_id, done.object) == (file.id, store.id, "vector_store.file"), done
    assert done.status == "completed" and done.last_error is None and done.usage_bytes == file.bytes, done
    assert done.attributes == {"kind": "tale", "year": 1851} and done.chunking_strategy.type == "static", done
    assert done.chunking_strategy.static.max_chunk_size_tokens == 256, done
    assert stores.files.retrieve(file.id, vector_store_id=store.id) == done
    contents = list(stores.files.content(file.id, vector_store_id=store.id))
    assert [part.text for part in contents] == [texts[document]] and contents[0].type == "text", contents
    changed = stores.files.update(file.id, vector_store_id=store.id, attributes={"kind": "story", "year": 1852})
    assert changed.attributes == {"kind": "story", "year": 1852}, changed
    again = stores.retrieve(store.id)
    assert again.file_counts.completed == again.file_counts.total == 1 and again.usage_bytes == file.bytes, again
    # What cannot be read fails, and says why.
    for name, content, code in (
        ("a.pdf", b"%PDF-1.4", "unsupported_file"),
        ("a.txt", b"caf\xe9", "invalid_file"),
        ("b.txt", b" \n ", "invalid_file"),
    ):
        failed = stores.files.upload_and_poll(vector_store_id=store.id, file=(name, content), poll_interval_ms=50)
        assert failed.status == "failed" and failed.last_error.code == code, failed
        assert name in failed.last_error.message and "/" not in failed.last_error.message.split("`")[0], failed
        refused(openai.BadRequestError, "file_id", stores.files.content, failed.id, vector_store_id=store.id)
    assert len(list(stores.files.list(store.id, filter="failed", limit=1))) == 3
    assert [f.id for f in stores.files.list(store.id, filter="completed")] == [file.id]
    for failed in stores.files.list(store.id, filter="failed", limit=1):
        assert stores.files.delete(failed.id, vector_store_id=store.id).deleted
        client.files.delete(failed.id)
    assert [f.id for f in stores.files.list(store.id)] == [file.id]
    absent = openai.NotFoundError
    refused(absent, "file_id", stores.files.create, store.id, file_id="file-absent")
    refused(absent, "file_id", stores.files.retrieve, "file-absent", vector_store_id=store.id)
    refused(absent, "vector_store_id", stores.files.create, "vs_absent", file_id=file.id)
    bad = openai.BadRequestError
    refused(bad, "attributes.a", stores.files.create, store.id, file_id=file.id, attributes={"a": ["b"]})
    small = {"type": "static", "static": {"max_chunk_size_tokens": 50, "chunk_overlap_tokens": 0}}
    refused(bad, "chunking_strategy.static.max_chunk_size_tokens", stores.files.create, store.id, file_id=file.id,
            chunking_strategy=small)


def batches(store):
    # A text that is in the store already, and the same text under another name.
    with open(other, "rb") as one, open(document, "rb") as two:
        batch = stores.file_batches.upload_and_poll(store.id, files=[one, two], poll_interval_ms=50)
    assert batch.status == "completed" and batch.file_counts.completed == batch.file_counts.total == 2, batch
    names = {f.model_extra["filename"] for f in stores.file_batches.list_files(batch.id, vector_store_id=store.id, limit=1)}
    assert names == {os.path.basename(document), os.path.basename(other)}, names
    name = lambda f: f.model_extra["filename"] == os.path.basename(document)
    ids = [f.id for f in sorted(stores.file_batches.list_files(batch.id, vector_store_id=store.id), key=name)]
    chunks = {"type": "static", "static": {"max_chunk_size_tokens": 100, "chunk_overlap_tokens": 10}}
    own = stores.file_batches.create_and_poll(
        store.id, poll_interval_ms=50,
        files=[{"file_id": ids[0], "attributes": {"kind": "x"}, "chunking_strategy": chunks}, {"file_id": ids[1]}],
    )
    assert own.status == "completed", own
    cut = stores.files.retrieve(ids[0], vector_store_id=store.id)
    assert cut.chunking_strategy.static.max_chunk_size_tokens == 100 and cut.attributes == {"kind": "x"}, cut
    done = stores.file_batches.cancel(batch.id, vector_store_id=store.id)
    assert done.status == "completed", done
    for id in ids:
        client.files.delete(id)
    assert stores.file_batches.retrieve(batch.id, vector_store_id=store.id).file_counts.total == 0
    refused(openai.NotFoundError, "batch_id", stores.file_batches.retrieve, "vsfb_absent", vector_store_id=store.id)
    refused(openai.BadRequestError, "file_ids", stores.file_batches.create, store.id, file_ids=[])
    # What is large waits long enough to be given up.
    long = "\n\n".join(f"Paragraph {number} of a long text about nothing much." for number in range(4000))
    waiting = [upload(f"long-{number}.txt", f"{number} {long}") for number in range(3)]
    batch = stores.file_batches.create(store.id, file_ids=[file.id for file in waiting])
    assert batch.status == "in_progress" and batch.file_counts.in_progress == 3, batch
    assert stores.retrieve(store.id).status == "in_progress"
    cancelled = stores.file_batches.cancel(batch.id, vector_store_id=store.id)
    assert cancelled.status == "cancelled" and cancelled.file_counts.cancelled == 3, cancelled
    assert len(list(stores.files.list(store.id, filter="cancelled"))) == 3
    for file in waiting:
        client.files.delete(file.id)


def searching(store, file):
    found = stores.search(store.id, query=question)
    assert found.object == "vector_store.search_results.page" and found.model_extra["search_query"] == [question], found
    assert found.model_extra["next_page"] is None, found
    for most, more in ((1, True), (50, False)):
        some = stores.search(store.id, query=question, max_num_results=most)
        assert some.model_extra["has_more"] == more and len(list(some)) == len(some.data) <= most, some
    best = found.data[0]
    assert (best.file_id, best.filename) == (file.id, os.path.basename(document)), best
    assert best.score == 1.0 and best.attributes == {"kind": "story", "year": 1852} and best.content[0].type == "text", best
    assert any(answer.lower() in hit.content[0].text.lower() for hit in found.data), found
    scores = [hit.score for hit in found.data]
    assert scores == sorted(scores, reverse=True) and all(0 < score <= 1 for score in scores), scores
    for hit in found.data:
        span = hit.model_extra["span"]
        assert texts[document][span["start"] : span["end"]] == hit.content[0].text, hit
    both = stores.search(store.id, query=[question, "harbour"], max_num_results=3).data
    assert len(both) == 3 and both[0].score == 1.0, both
    high = stores.search(store.id, query=question, ranking_options={"score_threshold": 0.6}).data
    assert [hit.score for hit in high] == [score for score in scores if score >= 0.6], high
    compare = lambda type, key, value: {"type": type, "key": key, "value": value}
    year, kind = compare("gte", "year", 1852), compare("eq", "kind", "story")
    for filters, admitted in (
        (year, True), (kind, True), (compare("lt", "year", 1852), False), (compare("ne", "kind", "story"), False),
        (compare("in", "kind", ["story", "x"]), True), (compare("nin", "kind", ["story"]), False),
        ({"type": "and", "filters": [year, compare("lte", "year", 1851)]}, False),
        ({"type": "or", "filters": [compare("gt", "year", 1852), kind]}, True),
    ):
        hits = stores.search(store.id, query=question, filters=filters).data
        assert bool(hits) == admitted, (filters, hits)
    bad = openai.BadRequestError
    refused(bad, "query", stores.search, store.id, query="")
    refused(bad, "filters.filters[0].key", stores.search, store.id, query="x",
            filters={"type": "and", "filters": [{"type": "eq", "value": 1}]})
    refused(bad, "max_num_results", stores.search, store.id, query="x", max_num_results=51)
    refused(bad, "rewrite_query", stores.search, store.id, query="x", rewrite_query=True)
    refused(openai.NotFoundError, "vector_store_id", stores.search, "vs_absent", query="x")


def answered(store, file):
    """A vector store is a collection to answer from."""
    done = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}], max_tokens=32,
        extra_body={"quire": {"collection": store.id}},
    )
    assert done.choices[0].message.content.strip() == answer, done
    extra = done.model_extra["quire"]
    assert extra["stats"]["chunks_computed"] == 0, extra["stats"]
    assert {a.model_extra["file_id"] for a in done.choices[0].message.annotations} == {file.id}, done
    assert all(c["document"] == os.path.basename(document) and c["file_id"] == file.id for c in extra["citations"]), extra


def collections_of_the_command_line():
    """What was ingested otherwise is a store, too."""
    ingested = next(s for s in stores.list() if s.name == "default")
    assert ingested.file_counts.completed == 2 and ingested.status == "completed", ingested
    listed = list(stores.files.list(ingested.id, limit=1))
    assert len(listed) == 2 and all(f.id.startswith("doc_") and f.chunking_strategy.type == "other" for f in listed), listed
    hit = stores.search(ingested.id, query=question).data[0]
    assert hit.filename == os.path.basename(document) and hit.file_id in {f.id for f in listed}, hit
    read = list(stores.files.content(hit.file_id, vector_store_id=ingested.id))
    assert read[0].text == texts[document]
    stores.files.update(hit.file_id, vector_store_id=ingested.id, attributes={"from": "shell"})
    only = {"type": "eq", "key": "from", "value": "shell"}
    assert {h.file_id for h in stores.search(ingested.id, query=question, filters=only).data} == {hit.file_id}
    # Its documents are files: listed, retrieved, read and deleted as such.
    ids = {f.id for f in listed}
    assert {f.id for f in client.files.list(limit=1) if f.id.startswith("doc_")} == ids
    assert {f.id for f in client.files.list(purpose="user_data")} & ids == set()
    known = client.files.retrieve(hit.file_id)
    assert (known.id, known.filename, known.bytes) == (hit.file_id, hit.filename, len(texts[document].encode())), known
    assert client.files.content(hit.file_id).read() == texts[document].encode()
    other_id = (ids - {hit.file_id}).pop()
    stores.files.delete(hit.file_id, vector_store_id=ingested.id)
    assert hit.file_id not in {h.file_id for h in stores.search(ingested.id, query=question).data}
    refused(openai.NotFoundError, "file_id", client.files.retrieve, hit.file_id)
    assert client.files.delete(other_id).deleted
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        refused(openai.NotFoundError, "file_id", call, other_id)
    assert stores.retrieve(ingested.id).file_counts.total == 0


def removed(store, file):
    """A file that is deleted is in no store any more."""
    assert client.files.delete(file.id).deleted
    refused(openai.NotFoundError, "file_id", stores.files.retrieve, file.id, vector_store_id=store.id)
    assert stores.search(store.id, query=question).data == []
    assert stores.retrieve(store.id).file_counts.total == 0
    assert stores.delete(store.id).deleted
    refused(openai.NotFoundError, "vector_store_id", stores.search, store.id, query="x")


file = files()
store = made_and_changed()
attached(store, file)
batches(store)
searching(store, file)
answered(store, file)
collections_of_the_command_line()
removed(store, file)
print("ok")
