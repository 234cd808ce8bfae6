// Everything shown is made with createElement and text nodes: a token or a label can look like HTML, it never is.

const byId = (id) => document.getElementById(id);

// el("p.quiet", { title: "…" }, children): the attributes may be left out, a function among them is a listener.
function el(kind, ...rest) {
  const [name, ...classes] = kind.split(".");
  const attributes = rest[0]?.constructor === Object ? rest.shift() : {};
  const node = document.createElement(name);
  if (classes.length) node.className = classes.join(" ");
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(key, value);
    else if (value !== false && value != null) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...rest.flat(Infinity).filter((child) => child != null && child !== false));
  return node;
}

function svg(name, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

const count = (value) => value.toLocaleString("en");
const plural = (value, one, many = one + "s") => `${count(value)} ${value === 1 ? one : many}`;

function number(value) {
  if (value == null) return "–";
  if (typeof value === "string" || value === 0) return String(value).replace("-", "−");
  const size = Math.abs(value);
  if (Number.isInteger(value) || size >= 1000) return count(Math.round(value)).replace("-", "−");
  const text = size < 0.001 ? value.toExponential(1) : size < 1 ? value.toFixed(3) : value.toPrecision(3);
  return text.replace(/-/g, "−");
}

function percent(share) {
  if (share == null) return "–";
  if (share === 0) return "0 %";
  const value = 100 * share;
  if (value >= 10) return `${value.toFixed(1)} %`.replace("100.0", "100");
  return `${value >= 1e-4 ? Number(value.toPrecision(2)) : value.toExponential(1)} %`;
}

// Control characters and those that turn the direction of text are named, so that they act on nothing around them.
const SIGNS = { "\n": "↵", "\r": "␍", "\t": "⇥", "\u00ad": "‹soft hyphen›", "\u200b": "‹zero width›" };
const UNSEEN = /[\u0000-\u001f\u007f-\u009f\u00ad\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g;
const named = (sign) => SIGNS[sign] ?? `‹U+${sign.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}›`;
const visible = (text) => (text === "" ? "∅" : text.replace(UNSEEN, named));
const spaced = (text) => visible(text).replace(/^ +| +$/g, (spaces) => "␣".repeat(spaces.length));
