// SPDX-License-Identifier: Apache-2.0
// One conversation: shows messages, streams responses, edits and regenerates. app.js provides options and storage.

import { ApiError, describe, generate } from "./api.js";
import { $, announce, copy, el, fit } from "./dom.js";
import { draw } from "./markdown.js";

const WAIT = 60; // ms between redraws of a streaming response

export class Chat {
  #abort = null;
  #entry = null;

  /** `options()`: model and sampling; `keep(entry)` saves; `askKey()` asks for a key; `onBusy(yes)` reports changes. */
  constructor({ options, keep, askKey, onBusy }) {
    Object.assign(this, { options, keep, askKey, onBusy });
  }

  get busy() {
    return this.#abort !== null;
  }

  get entry() {
    return this.#entry;
  }

  show(entry) {
    this.stop();
    this.#entry = entry;
    $("messages").replaceChildren(...entry.messages.map((message) => this.#article(message)));
    $("empty").hidden = entry.messages.length > 0;
    $("log").scrollTop = $("log").scrollHeight;
  }

  stop() {
    this.#abort?.abort();
  }

  async send(text) {
    if (this.busy) return;
    this.#add({ role: "user", content: text });
    await this.#answer();
  }

  #add(message) {
    const article = this.#article(message);
    this.#entry.messages.push(message);
    $("messages").append(article);
    $("empty").hidden = true;
    $("log").scrollTop = $("log").scrollHeight;
    return article;
  }

  /** Removes `message` and everything after it. */
  #cut(message) {
    const place = this.#entry.messages.indexOf(message);
    this.#entry.messages.splice(place);
    while ($("messages").childElementCount > place) $("messages").lastChild.remove();
  }

  async #answer() {
    const abort = (this.#abort = new AbortController());
    const entry = this.#entry; // the user may open another before the response ends
    const body = { ...this.options(), messages: payload(entry) };
    const message = { role: "assistant", content: "", stats: {} };
    const article = this.#add(message);
    this.keep(entry);
    this.onBusy(true);
    article.ariaBusy = "true";
    announce("The model is responding");
    const growing = new Growing(article, message);
    const { signal } = abort;
    try {
      await this.#generate(body, { signal, stats: message.stats, onText: (text) => growing.add(text) });
    } catch (error) {
      if (signal.aborted) message.stats.finish = "stopped";
      else message.error = error instanceof ApiError ? error.message : `Error in this page: ${error.message}`;
    }
    this.#abort = null;
    article.ariaBusy = "false";
    growing.end();
    article.replaceWith(this.#article(message));
    announce(message.error ?? `Response complete: ${message.stats.tokens ?? 0} tokens`);
    if (entry === this.#entry) growing.follow();
    this.keep(entry);
    this.onBusy(false);
  }

  async #generate(body, ways) {
    try {
      await generate("v1/chat/completions", body, ways);
    } catch (error) {
      if (error.status !== 401 || !(await this.askKey())) throw error;
      await generate("v1/chat/completions", body, ways);
    }
  }

  #article(message) {
    const text = el("div", { className: "body" });
    if (message.role === "user") text.textContent = message.content;
    else draw(text, message.content);
    const name = el("h3", { className: "unseen", textContent: names[message.role] });
    const article = el("article", { className: message.role }, name, text);
    if (message.error) article.append(el("p", { className: "error", role: "alert", textContent: message.error }));
    const stats = el("span", { className: "stats", textContent: message.stats ? describe(message.stats) : "" });
    const copying = el("button", { type: "button", textContent: "Copy" });
    copying.onclick = () => copy(message.content, copying);
    const again = el("button", { type: "button" });
    if (message.role === "user") {
      again.textContent = "Edit";
      again.onclick = () => this.#edit(message, article);
    } else {
      again.textContent = message.error ? "Try again" : "Regenerate";
      again.onclick = () => this.#again(message);
    }
    article.append(el("footer", {}, stats, el("span", { className: "actions" }, copying, again)));
    return article;
  }

  #again(message) {
    if (this.busy) return;
    this.#cut(message);
    this.#answer();
    $("prompt").focus();
  }

  #edit(message, article) {
    if (this.busy) return;
    const area = el("textarea", { value: message.content, ariaLabel: "Edit the message" });
    const form = el("form", { className: "edit" }, area, el("div", { className: "bar" },
      el("button", { className: "primary", type: "submit", textContent: "Send" }),
      el("button", { type: "button", textContent: "Cancel", onclick: () => form.replaceWith(article) })));
    form.onsubmit = (event) => {
      event.preventDefault();
      if (this.busy || !area.value.trim()) return;
      form.replaceWith(article);
      this.#cut(message);
      this.send(area.value);
      $("prompt").focus();
    };
    area.oninput = () => fit(area);
    area.onkeydown = (event) => submitOnEnter(event, form);
    article.replaceWith(form);
    fit(area);
    area.focus();
  }
}

const names = { user: "You", assistant: "Model" };

export function submitOnEnter(event, form) {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  form.requestSubmit();
}

/** The messages to send. Empty failed responses are dropped; consecutive messages of one role are joined. */
function payload({ system, messages }) {
  const sent = system.trim() ? [{ role: "system", content: system }] : [];
  for (const { role, content } of messages) {
    if (!content) continue;
    if (sent.at(-1)?.role === role) sent.at(-1).content += `\n\n${content}`;
    else sent.push({ role, content });
  }
  return sent;
}

/** A streaming response: redrawn at intervals, and scrolled into view if the user is at the end. */
class Growing {
  #timer = 0;

  constructor(article, message) {
    Object.assign(this, { article, message, atEnd: true });
    $("log").onscroll = () => {
      const { scrollHeight, scrollTop, clientHeight } = $("log");
      this.atEnd = scrollHeight - scrollTop - clientHeight < 60;
    };
  }

  add(text) {
    this.message.content += text;
    this.#timer ||= setTimeout(() => this.#draw(), WAIT);
  }

  #draw() {
    this.#timer = 0;
    draw(this.article.querySelector(".body"), this.message.content);
    this.article.querySelector(".stats").textContent = describe(this.message.stats);
    this.follow();
  }

  follow() {
    if (this.atEnd) $("log").scrollTop = $("log").scrollHeight;
  }

  end() {
    clearTimeout(this.#timer);
    $("log").onscroll = null;
  }
}
