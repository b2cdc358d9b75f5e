// SPDX-License-Identifier: Apache-2.0
// Renders the Markdown that models use most as DOM nodes. Text stays text; links and images are not rendered.

import { copy, el } from "./dom.js";

const INLINE = /`([^`\n]+)`|\*\*([^*\n]+)\*\*|\*(?! )([^*\n]+)\*/g; // linear: each part ends at the next mark
const ITEM = /^\s{0,8}(?:[-*+]|(\d{1,9})[.)])\s+/;
const HEADING = /^#{1,6}\s+/;

/** Shows `text` in `container`. Rebuilds only the blocks that changed: while streaming, just the last. */
export function draw(container, text) {
  const blocks = split(text);
  const shown = (container.blocks ??= []);
  let same = 0;
  while (same < blocks.length && shown[same]?.source === blocks[same]) same++;
  for (const old of shown.splice(same)) old.node.remove();
  for (const source of blocks.slice(same)) {
    const node = build(source);
    container.append(node);
    shown.push({ source, node });
  }
}

/** Splits text into blocks: fenced code, or lines between empty lines. */
function split(text) {
  const blocks = [];
  let block = [];
  let fence = "";
  const end = () => {
    if (block.length) blocks.push(block.join("\n"));
    block = [];
  };
  for (const line of text.split("\n")) {
    const mark = line.match(/^\s{0,3}(`{3,}|~{3,})/)?.[1];
    if (fence) {
      block.push(line);
      if (mark?.startsWith(fence) && line.trim() === mark) {
        fence = "";
        end();
      }
    } else if (mark) {
      end();
      fence = mark;
      block.push(line);
    } else if (line.trim() === "") {
      end();
    } else {
      block.push(line);
    }
  }
  end();
  return blocks;
}

function build(source) {
  const lines = source.split("\n");
  const fence = lines[0].match(/^\s{0,3}(`{3,}|~{3,})\s*(.*)$/);
  if (fence) return code(lines, fence[1], fence[2]);
  const node = el("div", { className: "block" });
  let list = null;
  let paragraph = null;
  for (const line of lines) {
    const item = line.match(ITEM);
    if (item) {
      const tag = item[1] ? "OL" : "UL";
      if (list?.tagName !== tag) {
        list = el(tag);
        if (item[1]) list.start = Number(item[1]);
        node.append(list);
      }
      list.append(inline(el("li"), line.slice(item[0].length)));
      paragraph = null;
    } else if (HEADING.test(line)) {
      node.append(inline(el("p", { className: "heading" }), line.replace(HEADING, "")));
      list = paragraph = null;
    } else if (list && /^\s/.test(line)) {
      list.lastChild.append("\n");
      inline(list.lastChild, line.trim());
    } else {
      if (paragraph) paragraph.append("\n");
      else node.append((paragraph = el("p")));
      inline(paragraph, line);
      list = null;
    }
  }
  return node;
}

function code(lines, mark, language) {
  const closed = lines.length > 1 && lines.at(-1).trim().startsWith(mark);
  const text = lines.slice(1, closed ? -1 : undefined).join("\n");
  const button = el("button", { type: "button", textContent: "Copy" });
  button.onclick = () => copy(text, button);
  const head = el("div", { className: "code-head" }, el("span", { textContent: language.slice(0, 40) }), button);
  return el("div", { className: "code" }, head, el("pre", { tabIndex: 0 }, el("code", { textContent: text })));
}

function inline(node, text) {
  let end = 0;
  for (const found of text.matchAll(INLINE)) {
    node.append(text.slice(end, found.index));
    const [whole, code, strong, em] = found;
    if (code) node.append(el("code", { textContent: code }));
    else node.append(el(strong ? "strong" : "em", { textContent: strong ?? em }));
    end = found.index + whole.length;
  }
  node.append(text.slice(end));
  return node;
}
