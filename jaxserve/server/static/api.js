// SPDX-License-Identifier: Apache-2.0
// The API client: the API key, errors, and event streams. It does not touch the DOM.

const KEY = "jaxserve.key";

/** The API key, stored for this tab only. */
export const apiKey = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

export class ApiError extends Error {
  constructor(message, status = 0, answer = null) {
    super(message);
    this.status = status; // 0: no response, or an incomplete one
    this.answer = answer; // the response body if it was JSON
  }
}

/** Fetches `path` relative to the page, as a proxy may add a prefix. Throws ApiError unless the status is 2xx. */
export async function call(path, { body, signal } = {}) {
  const headers = {};
  // Header values are bytes: send the key as UTF-8, as other clients do.
  if (apiKey.get()) {
    headers.Authorization = `Bearer ${String.fromCharCode(...new TextEncoder().encode(apiKey.get()))}`;
  }
  if (body) headers["Content-Type"] = "application/json";
  const options = { headers, signal, cache: "no-store", credentials: "same-origin" };
  if (body) Object.assign(options, { method: "POST", body: JSON.stringify(body) });
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ApiError("Cannot reach the server.");
  }
  if (!response.ok) throw await failure(response);
  return response;
}

async function failure(response) {
  const text = await response.text().catch(() => "");
  let answer = null;
  try {
    answer = JSON.parse(text);
  } catch {
    // Not JSON, such as a proxy's error page: the status is enough.
  }
  let message = answer?.error?.message;
  if (typeof message !== "string" || !message) message = `The server returned status ${response.status}.`;
  const wait = response.headers.get("Retry-After");
  if (wait) message += ` Retry in ${wait} s.`;
  return new ApiError(message, response.status, answer);
}

/** Yields the data of each server-sent event. Lines may end in CR, LF or CRLF, and chunks may split anywhere. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const text = rest + value;
      // A trailing CR may be the first half of a CRLF.
      const lines = text.split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        else if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function* chunks(path, body, signal) {
  const response = await call(path, { body, signal });
  try {
    for await (const data of events(response)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(chunk.error.message ?? "The request failed.", Number(chunk.error.code) || 0);
      yield chunk;
    }
  } catch (error) {
    if (signal.aborted || error instanceof ApiError) throw error;
    if (error instanceof SyntaxError) throw new ApiError("The server sent an event that is not valid JSON.");
  }
  throw new ApiError("The connection closed before the response was complete.");
}

/** Streams one response. `onText` receives each piece; `stats` is updated on the way, so that it survives an abort. */
export async function generate(path, body, { signal, onText, stats }) {
  const began = performance.now();
  const asked = { ...body, stream: true, stream_options: { include_usage: true } };
  let first = 0;
  for await (const chunk of chunks(path, asked, signal)) {
    if (chunk.usage) {
      stats.tokens = chunk.usage.completion_tokens;
      stats.prompt = chunk.usage.prompt_tokens;
      stats.cached = chunk.usage.prompt_tokens_details?.cached_tokens ?? 0;
      stats.exact = true;
    }
    const choice = chunk.choices?.[0];
    const text = choice?.delta?.content ?? choice?.text ?? "";
    if (text) {
      const now = performance.now();
      first ||= now;
      stats.ttft = first - began;
      stats.seconds = (now - first) / 1000;
      if (!stats.exact) stats.tokens = (stats.tokens ?? 0) + 1; // estimate until usage arrives: one token per event
      onText(text);
    }
    if (choice?.finish_reason) stats.finish = choice.finish_reason;
  }
}

/** One line about a response: finish reason, length, speed. */
export function describe(stats) {
  const parts = [];
  if (stats.finish) parts.push(stats.finish === "length" ? "length (token limit)" : stats.finish);
  if (stats.tokens) parts.push(`${stats.exact ? "" : "about "}${stats.tokens} token${stats.tokens === 1 ? "" : "s"}`);
  const rate = (stats.tokens - 1) / stats.seconds; // without the first token
  if (rate > 0 && Number.isFinite(rate)) parts.push(`${rate.toFixed(rate < 100 ? 1 : 0)} tok/s`);
  if (stats.ttft) parts.push(`first token after ${duration(stats.ttft)}`);
  if (stats.prompt) parts.push(`prompt ${stats.prompt}${stats.cached ? `, ${stats.cached} cached` : ""}`);
  return parts.join(" · ");
}

const duration = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`);
