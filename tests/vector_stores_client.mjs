// Drives files and vector stores of a running server with the public `openai` client for Node. Called by
// tests/vector_stores.rs:
//
//     node vector_stores_client.mjs BASE_URL KEY MODEL QUESTION ANSWER DOCUMENT
//
// Ends with exit code 0 and the line `ok`, or with the first expectation that does not hold.

import assert from "node:assert/strict";
import fs from "node:fs";
import { createRequire } from "node:module";
import path from "node:path";

// The package lies outside of the source tree.
const { default: OpenAI, NotFoundError, BadRequestError } = await import(
  createRequire(path.join(process.env.QUIRE_TEST_NODE, "package.json")).resolve("openai")
).then((module) => module.default?.OpenAI ? module.default : module);

const [baseURL, apiKey, model, question, answer, document] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0, timeout: 120_000 });
const stores = client.vectorStores;

const refused = async (kind, param, call) => {
  const error = await call().then(() => null, (error) => error);
  assert(error instanceof kind, `${kind.name} expected, got ${error}`);
  assert.equal(error.param, param, String(error));
};

const file = await client.files.create({ file: fs.createReadStream(document), purpose: "assistants" });
assert.equal(file.bytes, fs.statSync(document).size);
assert.equal(file.filename, path.basename(document));
const content = await (await client.files.content(file.id)).text();
assert.equal(content, fs.readFileSync(document, "utf8"));
const ids = [];
for await (const each of client.files.list({ limit: 1 })) ids.push(each.id);
assert(ids.includes(file.id));

const store = await stores.create({ name: "Node", file_ids: [file.id], metadata: { a: "b" } });
let attached = await stores.files.poll(store.id, file.id, { pollIntervalMs: 50 });
assert.equal(attached.status, "completed", JSON.stringify(attached));
attached = await stores.files.update(file.id, { vector_store_id: store.id, attributes: { kind: "tale" } });
assert.deepEqual(attached.attributes, { kind: "tale" });
const other = await client.files.create({ file: await OpenAI.toFile(Buffer.from("Nothing of it."), "b.txt"), purpose: "user_data" });
const batch = await stores.fileBatches.createAndPoll(store.id, { file_ids: [other.id] }, { pollIntervalMs: 50 });
assert.equal(batch.file_counts.completed, 1);
const listed = [];
for await (const each of stores.files.list(store.id, { limit: 1 })) listed.push(each.id);
assert.deepEqual(listed.sort(), [file.id, other.id].sort());

const filters = { type: "eq", key: "kind", value: "tale" };
const found = (await stores.search(store.id, { query: question, filters, max_num_results: 5 })).data;
assert(found.length > 0 && found.length <= 5 && found.every((hit) => hit.file_id === file.id));
assert(found.some((hit) => hit.content[0].text.toLowerCase().includes(answer.toLowerCase())));
const done = await client.chat.completions.create({
  model, messages: [{ role: "user", content: question }], max_tokens: 32, quire: { collection: store.id },
});
assert.equal(done.choices[0].message.content.trim(), answer);
assert(done.choices[0].message.annotations.some((annotation) => annotation.file_id === file.id));

await refused(BadRequestError, "query", () => stores.search(store.id, { query: "" }));
await refused(NotFoundError, "vector_store_id", () => stores.retrieve("vs_absent"));
for (const id of [file.id, other.id]) assert((await client.files.delete(id)).deleted);
assert.equal((await stores.retrieve(store.id)).file_counts.total, 0);
assert((await stores.delete(store.id)).deleted);
console.log("ok");
