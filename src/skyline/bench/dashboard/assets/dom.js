// Builds elements from tags and text. Nothing of the data is ever parsed as HTML: strings become text nodes.

const SVG = "http://www.w3.org/2000/svg";

// h("button", {class: "quiet", "aria-pressed": "true", onclick: go}, "Go"). Functions become listeners, true and false
// an attribute's presence; null and undefined attributes and children are left out.
export function h(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  append(element, children);
  return element;
}

function append(element, children) {
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    element.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
}

export const byId = (id) => document.getElementById(id);

// Replaces what is inside; the element of the same id keeps the keyboard's focus if it is there again.
export function replace(element, ...children) {
  const focused = element.contains(document.activeElement) ? document.activeElement.id : "";
  const fragment = document.createDocumentFragment();
  append(fragment, children);
  element.replaceChildren(fragment);
  if (focused) byId(focused)?.focus({ preventScroll: true });
}

// Rebuilds a control only when what it is made of has changed, so that an open list or a half-typed number survives
// fresh data.
export function onChange(element, signature, build) {
  const text = JSON.stringify(signature);
  if (element.dataset.signature === text) return;
  element.dataset.signature = text;
  replace(element, build());
}

export function save(name, href) {
  const link = h("a", { href, download: name });
  document.body.append(link);
  link.click();
  link.remove();
}

export function saveText(name, text, type) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  save(name, url);
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

let saying = 0;

// For screen readers, and for a moment on the screen.
export function announce(text) {
  byId("announcer").textContent = text;
}

function toast(text) {
  const element = byId("toast");
  element.textContent = text;
  element.hidden = false;
  clearTimeout(saying);
  saying = setTimeout(() => (element.hidden = true), 2500);
}

// The clipboard is closed to pages from files in some browsers; then the text is selected for the reader to copy.
export async function copy(text, source) {
  try {
    await navigator.clipboard.writeText(text);
    toast("Copied");
  } catch {
    if (source) getSelection().selectAllChildren(source);
    const done = source ? document.execCommand("copy") : false;
    toast(done ? "Copied" : "Press Ctrl+C to copy what is selected");
  }
}

let numbered = 0;

export function copyButton(text, what) {
  const code = h("code", {}, text);
  const button = h(
    "button",
    {
      type: "button",
      class: "copy",
      id: `copy-${what.replace(/\W+/g, "-")}-${numbered++}`,
      "aria-label": `Copy ${what}`,
    },
    "Copy",
  );
  button.addEventListener("click", () => copy(text, code));
  return h("div", { class: "command" }, h("pre", { tabindex: "0", role: "group", "aria-label": what }, code), button);
}
