// Numbers as text, elements, and what the rest of the page shares.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const LETTERS = {
  S: ["Sample", "rows of the batch"],
  O: ["Operator", "on some devices only"],
  A: ["Attribute", "positions: image rows, sequence"],
  P: ["Parameter", "channels, heads, what is summed over"],
};

function ms(ns, digits = 3) {
  const value = ns / 1e6;
  if (Math.abs(value) >= 1000) return (value / 1000).toPrecision(digits) + " s";
  if (Math.abs(value) >= 1 || value === 0) return trimmed(value, digits) + " ms";
  return trimmed(ns / 1e3, digits) + " µs";
}
function trimmed(value, digits) {
  const size = Math.abs(value) < 1 ? 0 : Math.floor(Math.log10(Math.abs(value)));
  return value.toFixed(Math.max(0, digits - 1 - size));
}
function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0, value = Math.abs(count);
  for (; value >= 1024 && unit < units.length - 1; ++unit) value /= 1024;
  return (count < 0 ? "−" : "") + (unit === 0 ? value.toFixed(0) : trimmed(value, 3)) + " " + units[unit];
}
const signed = (text, value) => (value > 0 ? "+" : value < 0 ? "−" : "±") + text.replace(/^[-−]/, "");
const count = (n) => n.toLocaleString("en-US");

// element("td", {class: "number"}, "text", child, ...)
function element(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}
function svg(tag, attributes = {}, ...children) {
  return filled(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}
function filled(out, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) out.addEventListener(name.slice(2), value);
    else out.setAttribute(name, value);
  }
  for (const child of children.flat()) if (child !== null && child !== undefined) out.append(child);
  return out;
}
function table(headings, rows) {
  const cell = (tag) => (content) => {
    const number = content && content.number !== undefined;
    return element(tag, number ? {class: "number"} : {}, ...(number ? [content.number].flat() : [content].flat()));
  };
  const head = headings.length ? [element("tr", {}, headings.map(cell("th")))] : [];
  return element("table", {}, head, rows.map((r) => element("tr", r.class ? {class: r.class} : {}, (r.cells || r).map(cell("td")))));
}

// "0-3, 8" of sorted numbers.
function ranges(numbers) {
  const out = [];
  for (let i = 0; i < numbers.length; ++i) {
    const first = numbers[i];
    while (i + 1 < numbers.length && numbers[i + 1] === numbers[i] + 1) ++i;
    out.push(numbers[i] === first ? `${first}` : `${first}–${numbers[i]}`);
  }
  return out.join(", ");
}

// The SOAP letters of an operator; none: every device does the whole.
function letters(node) {
  const [samples, attributes, parameters] = node.degrees;
  const out = [];
  if (samples > 1) out.push("S");
  if (node.devices.length && node.devices.length < data.world) out.push("O");
  if (attributes > 1) out.push("A");
  if (parameters > 1) out.push("P");
  return out;
}
const colour = (letter) => (letter ? `var(--${letter})` : "var(--whole)");
// A canvas knows no variables.
const computed = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

const tip = byId("tip");
function showTip(event, text) {
  tip.textContent = text;
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = Math.min(event.clientX + 14, innerWidth - box.width - 8) + "px";
  tip.style.top = Math.min(event.clientY + 14, innerHeight - box.height - 8) + "px";
}
const hideTip = () => { tip.hidden = true; };

// Round numbers that cover [0, most] in about `wanted` steps.
function ticks(most, wanted = 5) {
  const raw = most / wanted, power = 10 ** Math.floor(Math.log10(raw || 1));
  const step = [1, 2, 5, 10].map((m) => m * power).find((m) => m >= raw) || 1;
  const out = [];
  for (let at = 0; at <= most * 1.0001; at += step) out.push(at);
  return out;
}
