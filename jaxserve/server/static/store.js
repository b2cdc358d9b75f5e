// SPDX-License-Identifier: Apache-2.0
// Conversations in localStorage, one entry each. A tab owns the one that it shows: what another tab holds is copied
// when it is opened, so that two tabs never write the same entry.

const PREFIX = "jaxserve.chat.";
const SETTINGS = "jaxserve.settings";
// In sessionStorage, from when a page goes to when the next comes: a duplicated tab must not find it.
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

/** All that is kept, the latest first. */
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
    return false; // full, or forbidden
  }
}

let release = () => {};

/** True if no other tab has `id`, and none will until this one lets go. Waits for `patience` ms. */
function claim(id, patience) {
  // Locks exist on https and localhost only. Elsewhere a tab trusts what it carried over itself, and no more.
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

/** What this tab shows first: what it showed before a reload, else the latest conversation that no tab shows. */
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

/** Keeps `entry`, and forgets the oldest beyond what is kept. False if the browser has no room. */
export function save(entry) {
  if (!entry.messages.length) return true;
  const { messages, system } = entry;
  const kept = write(PREFIX + entry.id, { messages, system, updated: Date.now() });
  for (const old of conversations().slice(KEPT)) forget(old.id);
  return kept;
}

export const forget = (id) => localStorage.removeItem(PREFIX + id);

/** Called when the page goes: the tab's next page takes the conversation up. */
export const carry = (entry) => sessionStorage.setItem(CARRIED, entry.id);
