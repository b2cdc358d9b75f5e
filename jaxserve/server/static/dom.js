// SPDX-License-Identifier: Apache-2.0
// DOM helpers shared by all parts of the page.

export const $ = (id) => document.getElementById(id);

/** Creates an element with properties and children. Strings become text, never markup. */
export function el(tag, props = {}, ...children) {
  const node = Object.assign(document.createElement(tag), props);
  node.append(...children);
  return node;
}

/** Announces `text` to screen readers. */
export const announce = (text) => {
  $("announce").textContent = text;
};

/** Shows a message at the bottom of the page for 8 seconds, with an Undo button if `undo` is given. */
export function notice(text, undo) {
  clearTimeout(notice.timer);
  $("notice-text").textContent = text;
  $("notice-act").hidden = !undo;
  $("notice").hidden = false;
  const close = () => {
    $("notice").hidden = true;
  };
  $("notice-act").onclick = () => {
    close();
    undo();
  };
  notice.timer = setTimeout(close, 8000);
}

export async function copy(text, button) {
  const before = button.textContent;
  try {
    await navigator.clipboard.writeText(text); // undefined over plain HTTP, except on localhost
  } catch {
    const area = el("textarea", { value: text, className: "unseen" });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    button.focus();
  }
  button.textContent = "Copied";
  announce("Copied");
  setTimeout(() => (button.textContent = before), 1500);
}

/** Resizes `area` to fit its text, within the style sheet's limits. */
export function fit(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + 2}px`;
}
