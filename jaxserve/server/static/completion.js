// SPDX-License-Identifier: Apache-2.0
// Raw text completion in one text box: no chat template, no conversation.

import { ApiError, describe, generate } from "./api.js";
import { $, announce } from "./dom.js";

export class Completion {
  #abort = null;

  /** `options()` returns model and sampling, `askKey()` prompts for a key, `onBusy()` is called at start and end. */
  constructor({ options, askKey, onBusy }) {
    Object.assign(this, { options, askKey, onBusy });
    const [form, area] = [$("text-form"), $("text-prompt")];
    form.onsubmit = (event) => {
      event.preventDefault();
      if (!this.#abort && !$("text-run").disabled) this.#write(area);
    };
    area.onkeydown = (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
    };
    area.oninput = onBusy;
    $("text-stop").onclick = () => this.stop();
  }

  stop() {
    this.#abort?.abort();
  }

  /** Enables and disables controls. */
  refresh(able) {
    $("text-run").hidden = this.#abort !== null;
    $("text-stop").hidden = this.#abort === null;
    $("text-run").disabled = !able || !$("text-prompt").value;
  }

  async #write(area) {
    const stats = {};
    const before = area.value;
    const onText = (text) => {
      const follow = area.scrollHeight - area.scrollTop - area.clientHeight < 60;
      area.value += text;
      if (follow) area.scrollTop = area.scrollHeight;
      $("text-stats").textContent = describe(stats);
    };
    const { signal } = (this.#abort = new AbortController());
    const ask = () => generate("v1/completions", { ...this.options(), prompt: before }, { signal, stats, onText });
    area.readOnly = true;
    $("text-error").hidden = true;
    $("text-stats").textContent = "";
    this.onBusy();
    try {
      await ask().catch(async (error) => {
        if (error.status !== 401 || !(await this.askKey())) throw error;
        await ask();
      });
    } catch (error) {
      if (signal.aborted) stats.finish = "stopped";
      else this.#fail(error instanceof ApiError ? error.message : `Error in this page: ${error.message}`);
    }
    this.#abort = null;
    area.readOnly = false;
    $("text-stats").textContent = describe(stats);
    $("text-undo").disabled = false;
    $("text-undo").onclick = () => {
      area.value = before;
      $("text-undo").disabled = true;
      this.onBusy();
    };
    announce("Completion finished");
    this.onBusy();
  }

  #fail(message) {
    Object.assign($("text-error"), { hidden: false, textContent: message });
  }
}
