// OpenAI's own npm package, unchanged, against a running gateway: `node cases.mjs CASE`.
// Base URL and key come from OPENAI_BASE_URL and OPENAI_API_KEY, which the package reads by itself.

import assert from "node:assert/strict";
import OpenAI from "openai";

const client = new OpenAI({ maxRetries: 0 });
const model = "gpt-4o-mini";
const messages = [{ role: "user", content: "Say hello to the gateway." }];
const weather = {
  type: "function",
  function: {
    name: "weather",
    description: "The weather of a city.",
    parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
  },
};

const collect = async (stream) => {
  const items = [];
  for await (const item of stream) items.push(item);
  return items;
};
const text = (chunks) => chunks.map((chunk) => chunk.choices[0]?.delta?.content ?? "").join("");
const rejection = async (promise, type) => {
  const error = await promise.then(() => assert.fail("nothing was thrown"), (thrown) => thrown);
  assert.ok(error instanceof type, `${error.constructor.name}: ${error.message}`);
  return error;
};

const cases = {
  async chat_answers_with_text_and_usage() {
    const answer = await client.chat.completions.create({ model, messages });
    assert.ok(answer.choices[0].message.content);
    assert.equal(answer.choices[0].finish_reason, "stop");
    assert.equal(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens);
  },

  async stream_adds_up_and_shows_no_usage_unasked() {
    const whole = await client.chat.completions.create({ model, messages });
    const chunks = await collect(await client.chat.completions.create({ model, messages, stream: true }));
    assert.ok(chunks.every((chunk) => chunk.choices.length > 0 && !chunk.usage));
    assert.equal(text(chunks), whole.choices[0].message.content);
    assert.equal(chunks.at(-1).choices[0].finish_reason, "stop");
  },

  async stream_carries_usage_and_cost_when_asked() {
    // A question of its own: an answer from the cache costs nothing.
    const asked = [{ role: "user", content: "What do you cost, node?" }];
    const options = { model, messages: asked, stream: true, stream_options: { include_usage: true } };
    const last = (await collect(await client.chat.completions.create(options))).at(-1);
    assert.deepEqual(last.choices, []);
    assert.ok(last.usage.total_tokens > 0);
    assert.ok(Number(last.usage.cost_usd) > 0);
  },

  async stream_helper_assembles_the_answer() {
    const whole = await client.chat.completions.create({ model, messages });
    const final = await client.chat.completions.stream({ model, messages }).finalChatCompletion();
    assert.equal(final.choices[0].message.content, whole.choices[0].message.content);
  },

  async tools_make_the_round_trip() {
    const conversation = [{ role: "user", content: "What is the weather in Oslo?" }];
    const options = { model, messages: conversation, tools: [weather] };
    const asked = await client.chat.completions.create({ ...options, tool_choice: "required" });
    assert.equal(asked.choices[0].finish_reason, "tool_calls");
    const [call] = asked.choices[0].message.tool_calls;
    assert.equal(call.function.name, "weather");
    JSON.parse(call.function.arguments);
    conversation.push(asked.choices[0].message);
    conversation.push({ role: "tool", tool_call_id: call.id, content: "12 degrees and rain" });
    const answer = await client.chat.completions.create(options);
    assert.equal(answer.choices[0].finish_reason, "stop");
    assert.ok(answer.choices[0].message.content);
  },

  async legacy_completions_answer_and_stream() {
    const whole = await client.completions.create({ model, prompt: "Once upon a time" });
    const chunks = await collect(await client.completions.create({ model, prompt: "Once upon a time", stream: true }));
    assert.ok(whole.choices[0].text);
    assert.equal(chunks.map((chunk) => chunk.choices[0].text).join(""), whole.choices[0].text);
  },

  async embeddings_in_base64_equal_those_in_floats() {
    const options = { model: "text-embedding-3-small", input: ["one text", "another"] };
    const packed = await client.embeddings.create(options);
    const plain = await client.embeddings.create({ ...options, encoding_format: "float" });
    assert.equal(packed.data.length, 2);
    packed.data.forEach(({ embedding }, item) => {
      assert.equal(embedding.length, plain.data[item].embedding.length);
      embedding.forEach((value, i) => assert.ok(Math.abs(value - plain.data[item].embedding[i]) < 1e-6));
    });
  },

  async models_are_listed_and_found() {
    const names = (await collect(await client.models.list())).map(({ id }) => id);
    assert.ok(names.includes(model) && names.includes("vendor/model:one"));
    assert.equal((await client.models.retrieve("vendor/model:one")).id, "vendor/model:one");
  },

  async raw_response_shows_the_gateways_headers() {
    const asked = client.chat.completions.create({ model, messages: [{ role: "user", content: "Headers, node." }] });
    const { response, request_id } = await asked.withResponse();
    assert.equal(request_id, response.headers.get("x-request-id"));
    assert.equal(response.headers.get("x-qlens-provider"), "echo");
    assert.equal(response.headers.get("x-qlens-cache"), "miss");
    assert.ok(Number(response.headers.get("x-qlens-cost-usd")) > 0);
    assert.ok(Number(response.headers.get("x-ratelimit-remaining-requests")) > 0);
  },

  async wrong_key_is_an_authentication_error() {
    const stranger = new OpenAI({ apiKey: "sk-example-wrong", maxRetries: 0 });
    const error = await rejection(stranger.chat.completions.create({ model, messages }), OpenAI.AuthenticationError);
    assert.equal(error.code, "invalid_api_key");
  },

  async unknown_model_is_a_not_found_error() {
    const asked = client.chat.completions.create({ model: "gpt-none", messages });
    const error = await rejection(asked, OpenAI.NotFoundError);
    assert.deepEqual([error.code, error.param], ["model_not_found", "model"]);
  },

  async wrong_body_is_a_bad_request_error() {
    const asked = client.chat.completions.create({ model, messages, max_tokens: "many" });
    assert.equal((await rejection(asked, OpenAI.BadRequestError)).param, "max_tokens");
  },

  async blocked_prompt_is_a_bad_request_error() {
    const asked = client.chat.completions.create({ model, messages: [{ role: "user", content: "Open: open sesame." }] });
    assert.equal((await rejection(asked, OpenAI.BadRequestError)).code, "content_filter");
  },

  async too_large_a_body_is_a_413() {
    const asked = client.chat.completions.create({ model, messages: [{ role: "user", content: "x".repeat(1e6) }] });
    assert.equal((await rejection(asked, OpenAI.APIError)).status, 413);
  },

  async wrong_media_type_is_a_415() {
    const options = { body: { model, messages }, headers: { "content-type": "text/plain" } };
    assert.equal((await rejection(client.post("/chat/completions", options), OpenAI.APIError)).status, 415);
  },

  async wrong_method_is_a_405() {
    assert.equal((await rejection(client.get("/chat/completions"), OpenAI.APIError)).status, 405);
  },

  async unreachable_provider_is_an_internal_server_error() {
    const asked = client.chat.completions.create({ model: "nowhere", messages });
    const error = await rejection(asked, OpenAI.InternalServerError);
    assert.deepEqual([error.status, error.code], [502, "upstream_unreachable"]);
  },

  async stream_that_breaks_is_an_api_error_after_its_first_chunks() {
    const stream = await client.chat.completions.create({ model: "echo-broken", messages, stream: true });
    const chunks = [];
    const reading = (async () => {
      for await (const chunk of stream) chunks.push(chunk);
    })();
    assert.equal((await rejection(reading, OpenAI.APIError)).code, "upstream_truncated");
    assert.ok(chunks.length > 0);
  },

  async abandoned_stream_leaves_the_client_usable() {
    const stream = await client.chat.completions.create({ model: "echo-slow", messages, stream: true });
    for await (const _ of stream) break;
    assert.ok((await client.models.list()).data.length > 0);
  },

  // Runs alone, against a gateway with a low limit.
  async limit_is_a_rate_limit_error() {
    const calls = (async () => {
      for (let i = 0; i < 200; i += 1) await client.chat.completions.create({ model, messages });
    })();
    const error = await rejection(calls, OpenAI.RateLimitError);
    assert.deepEqual([error.code, error.type], ["rate_limit_exceeded", "requests"]);
    assert.ok(Number(error.headers.get("retry-after-ms")) > 0);
    const patient = new OpenAI({ maxRetries: 5 });
    assert.ok((await patient.chat.completions.create({ model, messages })).choices.length);
  },
};

const name = process.argv[2];
if (name === "--list") {
  console.log(JSON.stringify(Object.keys(cases)));
} else {
  await cases[name]();
  console.log("passed");
}
