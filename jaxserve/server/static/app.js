// SPDX-License-Identifier: Apache-2.0
// The entry point: connects controls, settings, conversations and server state.

import { ApiError, apiKey, call } from "./api.js";
import { Chat, submitOnEnter } from "./chat.js";
import { Completion } from "./completion.js";
import { $, el, fit, notice } from "./dom.js";
import { Engine } from "./engine.js";
import * as store from "./store.js";

const sampling = $("sampling");
let ready = false;
let models = [];

const chat = new Chat({ options, keep, askKey, onBusy: refresh });
const completion = new Completion({ options, askKey, onBusy: refresh });
const engine = new Engine(onState);

function keep(entry) {
  if (entry.cleared) return; // cleared while its response was streaming
  if (!store.save(entry)) notice("Browser storage is full: conversation not saved. Delete older ones.");
  listHistory();
}

// Request options.

function options() {
  const sent = {};
  for (const { name, value, type } of sampling.elements) {
    if (type === "number" && value !== "") sent[name] = Number(value);
  }
  const stop = sampling.elements.stop.value.split("\n").filter(Boolean);
  if (stop.length) sent.stop = stop.map((text) => text.replaceAll("\\n", "\n").replaceAll("\\t", "\t"));
  if ($("model").value) sent.model = $("model").value;
  return sent;
}

function restoreSettings() {
  const { fields = {} } = store.settings.read();
  for (const field of sampling.elements) if (field.name) field.value = fields[field.name] ?? "";
}

function keepSettings() {
  const named = [...sampling.elements].filter((field) => field.name);
  const fields = Object.fromEntries(named.map((field) => [field.name, field.value]));
  store.settings.write({ model: $("model").value, fields });
  const wrong = named.find((field) => !field.validity.valid);
  $("sampling-error").hidden = !wrong;
  const label = wrong?.parentNode.firstChild.textContent.trim();
  if (wrong) $("sampling-error").textContent = `${label}: ${wrong.validationMessage}`;
  refresh();
}

// Server state.

const STATES = {
  ok: ["Ready", ""],
  asleep: ["Asleep", "The engine is asleep. Wake it with POST /wake_up."],
  starting: ["Starting", "The model is loading."],
  draining: ["Shutting down", "The server is shutting down."],
  failed: ["Failed", "The engine has failed. See the server log."],
  unreachable: ["Offline", "Cannot reach the server."],
  unknown: ["Not ready", "The server is not ready."],
};

function onState(kind, { detail, done, total }) {
  const [label, title] = STATES[kind] ?? STATES.unknown;
  // Screen readers announce each write: write only on change.
  if ($("state").dataset.kind !== kind) Object.assign($("state"), { textContent: label }).dataset.kind = kind;
  const became = kind === "ok" && !ready;
  ready = kind === "ok";
  $("loading").hidden = ready;
  $("loading-title").textContent = title;
  $("loading-detail").textContent = detail ?? "";
  $("loading-bar").hidden = kind !== "starting";
  if (total > 0) Object.assign($("loading-bar"), { max: total, value: done });
  else $("loading-bar").removeAttribute("value");
  if (became) loadModels();
  refresh();
}

async function loadModels() {
  try {
    models = (await (await call("v1/models")).json()).data;
  } catch (error) {
    if (error.status === 401 && (await askKey())) return; // askKey loads the models
    notice(error instanceof ApiError ? error.message : "Cannot load the list of models.");
    return;
  }
  const chosen = $("model").value || store.settings.read().model;
  $("model").replaceChildren(...models.map(({ id }) => el("option", { value: id, textContent: id })));
  if (models.some(({ id }) => id === chosen)) $("model").value = chosen;
  $("model").disabled = false;
  showContext();
  refresh();
}

function showContext() {
  const length = models.find(({ id }) => id === $("model").value)?.max_model_len;
  $("context").textContent = length ? `Context length: ${length.toLocaleString("en")} tokens` : "";
}

let asking = null;

/** Resolves to true if the user entered a key, valid or not. Concurrent callers share one dialog. */
function askKey() {
  const dialog = $("key-dialog");
  asking ??= new Promise((resolve) => {
    let given = false;
    $("key-input").value = "";
    $("key-form").onsubmit = (event) => {
      event.preventDefault(); // the Content-Security-Policy forbids form submission
      given = true;
      apiKey.set($("key-input").value.trim());
      dialog.close();
    };
    dialog.onclose = () => {
      asking = null;
      resolve(given);
      if (!given) return;
      engine.poll();
      loadModels();
    };
    dialog.showModal();
  });
  return asking;
}

/** Enables and disables controls. */
function refresh() {
  const invalid = !$("sampling-error").hidden;
  const able = ready && !invalid;
  document.body.classList.toggle("busy", chat.busy);
  $("send").hidden = chat.busy;
  $("stop").hidden = !chat.busy;
  $("send").disabled = !able || !$("prompt").value.trim();
  for (const idea of $("ideas").querySelectorAll("button")) idea.disabled = !able;
  completion.refresh(able);
}

// Chat.

$("composer").onsubmit = (event) => {
  event.preventDefault();
  const text = $("prompt").value;
  if (chat.busy || $("send").disabled) return;
  $("prompt").value = "";
  fit($("prompt"));
  chat.send(text);
};
$("prompt").onkeydown = (event) => submitOnEnter(event, $("composer"));
$("prompt").oninput = () => {
  fit($("prompt"));
  refresh();
};
$("stop").onclick = () => {
  chat.stop();
  $("prompt").focus();
};
$("ideas").onclick = ({ target }) => {
  if (target.tagName === "BUTTON" && !chat.busy) chat.send(target.textContent);
};

function show(entry) {
  chat.show(entry);
  $("system").value = entry.system;
  listHistory();
}

function listHistory() {
  const now = chat.entry?.id;
  const items = store.conversations().map((entry) => {
    const title = entry.messages[0].content.slice(0, 60);
    const open = el("button", { type: "button", className: "open", textContent: title, ariaCurrent: entry.id === now });
    open.onclick = async () => entry.id === chat.entry.id || show(await store.open(entry.id));
    const drop = el("button", { type: "button", textContent: "Delete", ariaLabel: `Delete ${title}` });
    drop.onclick = () => {
      if (entry.id === chat.entry.id) return clear();
      store.forget(entry.id);
      listHistory();
      notice("Conversation deleted.", () => keep(entry));
    };
    return el("li", {}, open, drop);
  });
  $("history").replaceChildren(...(items.length ? items : [el("li", { textContent: "None yet" })]));
}

function clear() {
  const old = chat.entry;
  store.forget(old.id);
  old.cleared = true;
  show({ ...old, messages: [], cleared: false });
  notice("Conversation cleared.", () => {
    old.cleared = false;
    show(old);
    keep(old);
  });
}

$("new").onclick = async () => {
  selectTab("chat");
  show(await store.fresh(chat.entry.system));
  $("prompt").focus();
};
$("clear").onclick = clear;
$("system").oninput = () => {
  chat.entry.system = $("system").value;
  store.save(chat.entry);
};

// Tabs, panel, global events.

function selectTab(name) {
  for (const each of ["chat", "text"]) {
    const on = each === name;
    $(each).hidden = !on;
    $(`tab-${each}`).ariaSelected = on;
    $(`tab-${each}`).tabIndex = on ? 0 : -1;
  }
}

for (const [name, other] of [["chat", "text"], ["text", "chat"]]) {
  $(`tab-${name}`).onclick = () => selectTab(name);
  $(`tab-${name}`).onkeydown = ({ key }) => {
    if (key !== "ArrowLeft" && key !== "ArrowRight") return;
    selectTab(other);
    $(`tab-${other}`).focus();
  };
}

$("panel-toggle").onclick = () => {
  const open = document.body.classList.toggle("panel-open");
  $("panel-toggle").ariaExpanded = open;
};

document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || $("key-dialog").open) return;
  chat.stop();
  completion.stop();
});

sampling.oninput = keepSettings;
sampling.onsubmit = (event) => event.preventDefault();
sampling.onreset = () => setTimeout(keepSettings); // the fields are cleared after this event
$("model").onchange = () => {
  keepSettings();
  showContext();
};
$("key").onclick = askKey;
$("key-cancel").onclick = () => $("key-dialog").close();
addEventListener("pagehide", () => {
  if (!chat.entry) return;
  if (chat.busy) store.save(chat.entry);
  store.carry(chat.entry);
});
addEventListener("storage", listHistory); // another tab wrote

restoreSettings();
show(await store.start());
refresh();
engine.poll();
document.body.dataset.ready = "";
