// SPDX-License-Identifier: Apache-2.0
// Building elements, and the few things that every part of the page does with them.

export const $ = (id) => document.getElementById(id);

/** An element with properties and children; strings become text, never markup. */
export function el(tag, props = {}, ...children) {
  const node = Object.assign(document.createElement(tag), props);
  node.append(...children);
  return node;
}

/** Tells users of screen readers what others see happen. */
export const announce = (text) => {
  $("announce").textContent = text;
};

/** A message at the foot of the page for some seconds, with a way back if `undo` is given. */
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
    await navigator.clipboard.writeText(text); // absent on plain http but for localhost
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

/** As high as its text, within what the style sheet allows. */
export function fit(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + 2}px`;
}
