// SPDX-License-Identifier: Apache-2.0
// Conversations in localStorage, one entry each. A tab locks the conversation it shows. Opening one that another tab
// holds makes a copy, so that two tabs never write the same entry.

const PREFIX = "jaxserve.chat.";
const SETTINGS = "jaxserve.settings";
// In sessionStorage only between unload and reload, so that a duplicated tab does not find it.
const CARRIED = "jaxserve.tab";
const KEPT = 40;

const newId = () => `${Date.now().toString(36)}-${Math.random().toString(36).slice(2, 10)}`;

function readJson(key) {
  try {
    return JSON.parse(localStorage.getItem(key));
  } catch {
    return null;
  }
}

function read(id) {
  const entry = readJson(PREFIX + id);
  return Array.isArray(entry?.messages) ? { system: "", updated: 0, ...entry, id } : null;
}

/** All saved conversations, latest first. */
export function conversations() {
  const ids = Object.keys(localStorage).filter((key) => key.startsWith(PREFIX));
  const entries = ids.map((key) => read(key.slice(PREFIX.length))).filter((entry) => entry?.messages.length);
  return entries.sort((a, b) => b.updated - a.updated);
}

export const settings = {
  read: () => readJson(SETTINGS) ?? {},
  write: (value) => write(SETTINGS, value),
};

function write(key, value) {
  try {
    localStorage.setItem(key, JSON.stringify(value));
    return true;
  } catch {
    return false; // storage is full or disabled
  }
}

let release = () => {};

/** Locks `id` for this tab; resolves to false if another tab holds it for longer than `patience` ms. */
function claim(id, patience) {
  // Locks exist only on HTTPS and localhost. Elsewhere a tab claims only conversations that it carried over or created.
  if (!navigator.locks) return Promise.resolve(patience > 0);
  return new Promise((resolve) => {
    const options = patience ? { signal: AbortSignal.timeout(patience) } : { ifAvailable: true };
    const held = (lock) => {
      resolve(lock !== null);
      if (!lock) return null;
      release();
      return new Promise((done) => (release = done));
    };
    navigator.locks.request(PREFIX + id, options, held).catch(() => resolve(false));
  });
}

/** The conversation to show first: the one before a reload, else the latest no other tab holds, else a new one. */
export async function start() {
  const carried = sessionStorage.getItem(CARRIED);
  sessionStorage.removeItem(CARRIED);
  addEventListener("pageshow", () => sessionStorage.removeItem(CARRIED));
  if (carried && read(carried)) return open(carried, 1000);
  const latest = conversations()[0];
  return latest && (await claim(latest.id, 0)) ? latest : fresh();
}

export async function open(id, patience = 0) {
  const entry = read(id);
  if (await claim(id, patience)) return entry;
  return { ...(await fresh()), messages: entry.messages, system: entry.system };
}

export async function fresh(system = "") {
  const entry = { id: newId(), messages: [], system, updated: 0 };
  await claim(entry.id, 1000);
  return entry;
}

/** Saves `entry` and deletes the oldest beyond the limit. Returns false if storage is full. */
export function save(entry) {
  if (!entry.messages.length) return true;
  const { messages, system } = entry;
  const kept = write(PREFIX + entry.id, { messages, system, updated: Date.now() });
  for (const old of conversations().slice(KEPT)) forget(old.id);
  return kept;
}

export const forget = (id) => localStorage.removeItem(PREFIX + id);

/** Called on unload, so that the tab's next page continues the conversation. */
export const carry = (entry) => sessionStorage.setItem(CARRIED, entry.id);
