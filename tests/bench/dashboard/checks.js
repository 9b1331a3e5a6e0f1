// What a machine can check of accessibility; test_accessible.py runs it in the page. Each returns what is wrong.

const channels = (text) => (text.match(/[\d.]+/g) ?? []).map(Number);

// WCAG 2.2: relative luminance and contrast ratio.
function luminance(colour) {
  const [r, g, b] = colour
    .map((value) => value / 255)
    .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

function contrast(one, other) {
  const [a, b] = [luminance(one), luminance(other)].sort((p, q) => q - p);
  return (a + 0.05) / (b + 0.05);
}

function over(top, below) {
  const alpha = top[3] ?? 1;
  return top.slice(0, 3).map((value, index) => value * alpha + below[index] * (1 - alpha));
}

// The colours that an element may lie on: of a gradient, each stop.
function backgrounds(element) {
  const layers = [];
  const on = (base) => layers.reduceRight((below, layer) => over(layer, below), base);
  for (let at = element; at; at = at.parentElement) {
    const style = getComputedStyle(at);
    if (style.backgroundImage.includes("linear-gradient")) {
      return style.backgroundImage.match(/rgba?\([^)]*\)/g).map((stop) => on(channels(stop)));
    }
    const colour = channels(style.backgroundColor);
    if (colour.length === 3 || colour[3] === 1) return [on(colour)];
    if (colour[3] > 0) layers.push(colour);
  }
  return [[255, 255, 255]];
}

const isShown = (element) => element.getClientRects().length > 0;

// Text below the contrast that 1.4.3 (AA) asks for: [text, ratio, needed].
function faintText() {
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const text = walker.currentNode.textContent.trim();
    if (!text || !isShown(element) || element.closest("script, noscript, .sr-only")) continue;
    const style = getComputedStyle(element);
    if (style.visibility === "hidden" || Number(style.opacity) === 0) continue;
    const colour = channels(element instanceof SVGElement ? style.fill : style.color);
    const size = parseFloat(style.fontSize);
    const needed = size >= 24 || (size >= 18.66 && style.fontWeight >= 700) ? 3 : 4.5;
    for (const background of backgrounds(element)) {
      const ratio = contrast(over(colour, background), background);
      if (ratio < needed) found.push([text.slice(0, 40), Number(ratio.toFixed(2)), needed]);
    }
  }
  return found;
}

// Lines and marks of charts, and edges of controls, below the 3 of 1.4.11 (AA) on a card: [name, ratio].
function faintMarks() {
  const probe = document.createElement("span");
  document.body.append(probe);
  const value = (name) => {
    probe.style.color = `var(--${name})`;
    return channels(getComputedStyle(probe).color);
  };
  const names = ["edge", "accent", "frontier", "ink", ...Array.from({ length: 8 }, (_, index) => `series-${index}`)];
  const found = names.map((name) => [name, contrast(value(name), value("card"))]).filter(([, ratio]) => ratio < 3);
  probe.remove();
  return found;
}

const textOf = (ids) =>
  (ids ?? "")
    .split(" ")
    .map((id) => document.getElementById(id)?.textContent ?? "")
    .join("");

function nameOf(element) {
  return (
    element.getAttribute("aria-label") ||
    textOf(element.getAttribute("aria-labelledby")) ||
    [...(element.labels ?? [])].map((label) => label.textContent).join("") ||
    (element.matches("button, a") ? element.textContent : "") ||
    (element.querySelector(":scope > caption")?.textContent ?? "")
  );
}

// What assistive technology would stumble over.
function markup() {
  const found = [];
  const ids = [...document.querySelectorAll("[id]")].map((element) => element.id);
  ids.filter((id, index) => ids.indexOf(id) !== index).forEach((id) => found.push(`id ${id} twice`));
  for (const name of ["aria-labelledby", "aria-describedby", "for"]) {
    for (const element of document.querySelectorAll(`[${name}]`)) {
      for (const id of element.getAttribute(name).split(" ")) {
        if (!document.getElementById(id)) found.push(`${name} ${id} names nothing`);
      }
    }
  }
  const named = "button, a[href], select, input, [tabindex='0'], [role], section, nav, aside, table";
  for (const element of document.querySelectorAll(named)) {
    if (!isShown(element) || element.closest(".plot")) continue;
    if (["status", "alert", "tooltip"].includes(element.getAttribute("role"))) continue;
    if (!nameOf(element).trim()) found.push(`no name: ${element.outerHTML.slice(0, 90)}`);
  }
  const levels = [...document.querySelectorAll("h1, h2, h3")].filter(isShown).map(({ tagName }) => Number(tagName[1]));
  if (levels.filter((level) => level === 1).length !== 1) found.push("not one h1");
  levels.forEach((level, index) => {
    if (level > (levels[index - 1] ?? 0) + 1) found.push(`heading of level ${level} follows ${levels[index - 1]}`);
  });
  for (const header of document.querySelectorAll("th")) {
    if (!header.hasAttribute("scope")) found.push(`th without scope: ${header.textContent}`);
  }
  for (const element of document.querySelectorAll("[tabindex]")) {
    if (element.tabIndex > 0) found.push(`tabindex ${element.tabIndex}: ${element.outerHTML.slice(0, 90)}`);
  }
  for (const picture of document.querySelectorAll("svg:not(.plot svg, #js-plotly-tester)")) {
    if (picture.getAttribute("aria-hidden") !== "true") found.push("a picture without a text");
  }
  return found;
}
