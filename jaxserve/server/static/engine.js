// SPDX-License-Identifier: Apache-2.0
// The live engine view: polls /health every second while the tab is visible, and /metrics if the server is ready.

import { ApiError, call } from "./api.js";
import { $, el } from "./dom.js";

const EVERY = 1000; // ms
const MINUTE = 60; // samples
const CELLS = 144;
const DOTS = 96;
const STATES = ["used", "cached", "free"];

const LINE = /^[A-Za-z_]\w*:(\w+)(?:\{(.*)\})?\s+([^\s{}]+)(?:\s+\d+)?$/;

/** Sums Prometheus samples by metric name without prefix; `kv_blocks` by state, as `kv_blocks/free`. */
export function parseMetrics(text) {
  const sums = new Map();
  for (const line of text.split("\n")) {
    const found = line[0] !== "#" && line.match(LINE);
    if (!found) continue;
    const state = found[1] === "kv_blocks" ? found[2]?.match(/(?:^|,)state="(\w+)"/)?.[1] : null;
    const name = state ? `kv_blocks/${state}` : found[1];
    const value = Number(found[3]);
    if (Number.isFinite(value)) sums.set(name, (sums.get(name) ?? 0) + value);
  }
  return sums;
}

export class Engine {
  #ready = false;
  #last = null; // token count and time of the last sample
  #rates = [];
  #timer = 0;
  #polling = false;

  /** `onState(kind, health)`: kind is the status from /health, or "unreachable" or "unknown". */
  constructor(onState) {
    this.onState = onState;
    document.addEventListener("visibilitychange", () => {
      this.#last = null; // do not compute a rate across the time hidden
      this.poll();
    });
  }

  /** Polls now, then every second. */
  async poll() {
    clearTimeout(this.#timer);
    if (document.hidden || this.#polling) return;
    this.#polling = true;
    try {
      await this.#askHealth(); // /metrics responds even while requests are refused
      if (this.#ready) await this.#askMetrics();
    } finally {
      this.#polling = false;
    }
    if (!document.hidden) this.#timer = setTimeout(() => this.poll(), EVERY);
  }

  async #askHealth() {
    try {
      const response = await call("health", { signal: AbortSignal.timeout(5000) });
      this.#become((await response.json()).status, {});
    } catch (error) {
      if (!error.status) this.#become("unreachable", { detail: "Retrying every second." });
      else this.#become(error.answer?.status ?? "unknown", error.answer ?? { detail: error.message });
    }
  }

  #become(kind, health) {
    this.#ready = kind === "ok" || kind === "asleep";
    if (!this.#ready) this.#clear(kind === "unreachable" ? "no answer" : "not ready");
    this.onState(kind, health);
  }

  async #askMetrics() {
    try {
      const response = await call("metrics", { signal: AbortSignal.timeout(5000) });
      this.#show(parseMetrics(await response.text()));
      $("engine-note").textContent = "live";
    } catch (error) {
      const status = error instanceof ApiError ? error.status : 0;
      if (status === 401) this.#clear("needs the API key");
      else if (status) this.#clear("no metrics");
      else this.#clear("no answer");
    }
  }

  #clear(note) {
    $("engine-note").textContent = note;
    for (const id of ["running", "waiting", "rate", "hits"]) $(id).textContent = "–";
    $("rows").replaceChildren();
    $("kv").hidden = true;
    this.#last = null;
    showSpark((this.#rates = []));
  }

  #show(sums) {
    const get = (name) => sums.get(name) ?? 0;
    const running = get("num_requests_running");
    const waiting = get("num_requests_waiting");
    $("running").textContent = running;
    $("waiting").textContent = waiting;
    const queries = get("prefix_cache_queries_total");
    $("hits").textContent = queries ? `${Math.round((100 * get("prefix_cache_hits_total")) / queries)} %` : "–";
    showRows(running, waiting);
    this.#showRate(get("generation_tokens_total"));
    showBlocks(STATES.map((state) => get(`kv_blocks/${state}`)));
  }

  #showRate(tokens) {
    const now = performance.now();
    if (this.#last) {
      const rate = (Math.max(tokens - this.#last.tokens, 0) * 1000) / (now - this.#last.time);
      this.#rates = [...this.#rates, rate].slice(-MINUTE);
      $("rate").textContent = rate < 10 ? rate.toFixed(1) : Math.round(rate);
    }
    this.#last = { tokens, time: now };
    showSpark(this.#rates);
  }
}

function showRows(running, waiting) {
  const rows = $("rows");
  const shown = Math.min(running, DOTS);
  const dots = [...Array(shown).fill("run"), ...Array(Math.min(waiting, DOTS - shown)).fill("wait")];
  rows.replaceChildren(...dots.map((className) => el("i", { className })));
  const more = running + waiting - dots.length;
  if (more > 0) rows.append(el("small", { textContent: `+${more}` }));
  rows.ariaLabel = `${running} running, ${waiting} waiting`;
}

function showSpark(rates) {
  const [width, height] = [240, 44];
  const top = Math.max(...rates, 1);
  const points = rates.map((rate, place) => {
    const x = width - ((rates.length - 1 - place) * width) / (MINUTE - 1);
    return `${x.toFixed(1)} ${(height - 1 - (rate / top) * (height - 4)).toFixed(1)}`;
  });
  const [area, line] = $("spark").children;
  const first = points[0]?.split(" ")[0];
  line.setAttribute("d", points.length > 1 ? `M${points.join("L")}` : "");
  area.setAttribute("d", points.length > 1 ? `M${first} ${height}L${points.join("L")}L${width} ${height}Z` : "");
  $("spark").ariaLabel = `Tokens per second in the last minute, at most ${Math.round(top)}`;
}

/** Distributes at most `most` cells over the counts in proportion. Every nonzero count gets at least one cell. */
export function cells(counts, most = CELLS) {
  const total = counts.reduce((sum, count) => sum + count, 0);
  const all = Math.min(total, most);
  const shares = counts.map((count) => (count ? Math.max(1, Math.floor((count * all) / total)) : 0));
  // The largest state absorbs the rounding difference.
  shares[counts.indexOf(Math.max(...counts))] += all - shares.reduce((sum, share) => sum + share, 0);
  return shares;
}

function showBlocks(counts) {
  const total = counts.reduce((sum, count) => sum + count, 0);
  $("kv").hidden = !total;
  if (!total) return;
  const grid = $("kv-grid");
  const names = cells(counts).flatMap((share, place) => Array(share).fill(STATES[place]));
  while (grid.childElementCount > names.length) grid.lastChild.remove();
  while (grid.childElementCount < names.length) grid.append(el("i"));
  names.forEach((name, place) => {
    if (grid.children[place].className !== name) grid.children[place].className = name;
  });
  STATES.forEach((state, place) => ($(`kv-${state}`).textContent = counts[place].toLocaleString("en")));
  const used = (100 * counts[0]) / total;
  $("kv-total").textContent = `${total.toLocaleString("en")} · ${used.toFixed(used > 0 && used < 10 ? 1 : 0)} % used`;
  grid.ariaLabel = STATES.map((state, place) => `${counts[place]} ${state}`).join(", ");
}
