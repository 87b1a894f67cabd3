// The JavaScript clients against the real daemon (LATENTD_URL, started with --max-open-requests 4).
import assert from "node:assert/strict";
import { test } from "node:test";

import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { tool as langchainTool } from "@langchain/core/tools";
import { ChatOpenAI } from "@langchain/openai";
import { generateText, jsonSchema, Output, streamText, tool } from "ai";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const baseURL = `${process.env.LATENTD_URL}/v1`;
const model = "latentd-builtin";
const messages = [{ role: "user", content: "Tell me of the sea." }];
const greedy = { model, messages, temperature: 0, max_tokens: 16 };
const client = new OpenAI({ baseURL, apiKey: "unused", maxRetries: 0 });

// Every value has few forms, so that any model comes to the end.
const Mood = z.object({ mood: z.enum(["calm", "wild"]), deep: z.boolean() });
const moodSchema = {
  type: "object",
  properties: { mood: { enum: ["calm", "wild"] }, deep: { type: "boolean" } },
  required: ["mood", "deep"],
  additionalProperties: false,
};

const openaiTool = { type: "function", function: { name: "set_mood", description: "Sets it.", parameters: moodSchema } };

test("openai: whole and streamed", async () => {
  const whole = await client.chat.completions.create(greedy);
  assert.equal(whole.object, "chat.completion");
  const stream = await client.chat.completions.create({
    ...greedy,
    stream: true,
    stream_options: { include_usage: true },
  });
  let text = "";
  let usage;
  for await (const chunk of stream) {
    text += chunk.choices[0]?.delta?.content ?? "";
    usage = chunk.usage ?? usage;
  }
  assert.equal(text, whole.choices[0].message.content);
  assert.equal(usage.completion_tokens, whole.usage.completion_tokens);
});

test("openai: the accumulating helper gives what was streamed", async () => {
  const runner = client.chat.completions.stream(greedy);
  let text = "";
  runner.on("content", (delta) => (text += delta));
  assert.equal((await runner.finalChatCompletion()).choices[0].message.content, text);
});

test("openai: parse", async () => {
  const answer = await client.chat.completions.parse({
    model,
    messages,
    temperature: 1,
    max_tokens: 200,
    response_format: zodResponseFormat(Mood, "mood"),
  });
  Mood.parse(answer.choices[0].message.parsed);
});

test("openai: a required tool, whole and streamed", async () => {
  const body = { model, messages, seed: 3, max_tokens: 200, tools: [openaiTool], tool_choice: "required" };
  const whole = (await client.chat.completions.create({ ...body, parallel_tool_calls: false })).choices[0];
  assert.equal(whole.finish_reason, "tool_calls");
  Mood.parse(JSON.parse(whole.message.tool_calls[0].function.arguments));
  const final = await client.chat.completions.stream({ ...body, parallel_tool_calls: false }).finalChatCompletion();
  assert.equal(
    final.choices[0].message.tool_calls[0].function.arguments,
    whole.message.tool_calls[0].function.arguments,
  );
  assert.ok(final.choices[0].message.tool_calls[0].id);
});

test("openai: responses", async () => {
  const body = { model, input: "Tell me of the sea.", temperature: 0, max_output_tokens: 16 };
  const whole = await client.responses.create(body);
  const stream = client.responses.stream(body);
  assert.equal((await stream.finalResponse()).output_text, whole.output_text);
});

test("openai: models and errors", async () => {
  assert.equal((await client.models.retrieve(model)).id, model);
  assert.deepEqual(
    (await client.models.list()).data.map((each) => each.id),
    [model],
  );
  await assert.rejects(client.models.retrieve("other"), OpenAI.NotFoundError);
  await assert.rejects(client.chat.completions.create({ ...greedy, temperature: 9 }), (error) => {
    assert.ok(error instanceof OpenAI.BadRequestError);
    assert.equal(error.param, "temperature");
    return true;
  });
  await assert.rejects(client.chat.completions.create({ ...greedy, messages: [] }), OpenAI.BadRequestError);
});

test("openai: a full server is retried until there is room", async () => {
  const endless = { model, messages, stream: true, temperature: 1, max_tokens: 4000, ignore_eos: true };
  const streams = await Promise.all(Array.from({ length: 4 }, () => client.chat.completions.create(endless)));
  await assert.rejects(client.chat.completions.create(greedy), (error) => {
    assert.equal(error.status, 503);
    assert.equal(error.code, "server_overloaded");
    assert.ok(Number(error.headers.get("retry-after")) >= 1);
    return true;
  });
  setTimeout(() => streams.forEach((stream) => stream.controller.abort()), 500);
  const answer = await client.chat.completions.create(greedy, { maxRetries: 5 });
  assert.ok(answer.choices[0].message.content);
});

const provider = createOpenAICompatible({
  name: "latentd",
  baseURL,
  apiKey: "unused",
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const settings = { model: provider(model), prompt: "Tell me of the sea.", temperature: 0, maxOutputTokens: 16 };

test("ai: whole and streamed", async () => {
  const whole = await generateText(settings);
  const stream = streamText(settings);
  let text = "";
  for await (const delta of stream.textStream) text += delta;
  assert.equal(text, whole.text);
  assert.equal((await stream.usage).outputTokens, whole.usage.outputTokens);
  assert.equal(await stream.finishReason, whole.finishReason);
});

test("ai: a structured object", async () => {
  const answer = await generateText({ ...settings, maxOutputTokens: 200, output: Output.object({ schema: Mood }) });
  Mood.parse(answer.output);
});

test("ai: a tool, streamed", async () => {
  const stream = streamText({
    ...settings,
    maxOutputTokens: 200,
    tools: { set_mood: tool({ description: "Sets it.", inputSchema: jsonSchema(moodSchema) }) },
    toolChoice: { type: "tool", toolName: "set_mood" },
  });
  const calls = await stream.toolCalls;
  assert.equal(calls[0].toolName, "set_mood");
  Mood.parse(calls[0].input);
  assert.equal(await stream.finishReason, "tool-calls");
});

test("ai: errors", async () => {
  const unknown = { ...settings, model: provider("other"), maxRetries: 0 };
  await assert.rejects(generateText(unknown), (error) => error.statusCode === 404 && /does not exist/.test(error.message));
});

const chat = new ChatOpenAI({
  model,
  apiKey: "unused",
  temperature: 0,
  maxTokens: 200,
  maxRetries: 0,
  configuration: { baseURL },
});

test("langchain: whole and streamed", async () => {
  const short = new ChatOpenAI({ model, apiKey: "unused", temperature: 0, maxTokens: 16, configuration: { baseURL } });
  const whole = await short.invoke("Tell me of the sea.");
  let text = "";
  for await (const chunk of await short.stream("Tell me of the sea.")) text += chunk.content;
  assert.equal(text, whole.content);
  assert.ok(whole.usage_metadata.output_tokens > 0);
});

test("langchain: tools", async () => {
  const setMood = langchainTool(() => "done", { name: "set_mood", description: "Sets it.", schema: Mood });
  const answer = await chat.bindTools([setMood], { tool_choice: "set_mood" }).invoke("Tell me of the sea.");
  assert.equal(answer.tool_calls[0].name, "set_mood");
  Mood.parse(answer.tool_calls[0].args);
});

test("langchain: a structured object", async () => {
  Mood.parse(await chat.withStructuredOutput(Mood, { method: "jsonSchema" }).invoke("Tell me of the sea."));
});
