"use strict";
// Reading the data, building elements, colours. Text from rollouts enters the page through textContent only.
const OVERVIEW = JSON.parse(document.getElementById("overview").textContent);
const MANY_RUNS = OVERVIEW.runs.length > 1;
const RUN_COLORS = ["#2458c5", "#d1660b", "#16794a", "#6b3fa0", "#b3261e", "#0b7a85", "#8a5a00", "#555e6b"];
const FAMILIES = [...new Set(OVERVIEW.runs.map((run) => run.family))];
const familyColor = (family) => RUN_COLORS[FAMILIES.indexOf(family) % RUN_COLORS.length];

/** el("p", {class: "hint", title: t}, "text", child…): strings become text nodes, never markup. */
function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") Object.assign(node.style, value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child != null).map((child) => (child instanceof Node ? child : String(child))));
  return node;
}

const byId = (id) => document.getElementById(id);

/** Four significant digits, or a dash. */
function num(value, digits = 4) {
  if (value == null || Number.isNaN(value)) return "–";
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value) && Math.abs(value) < 1e6) return String(value);
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-3 || size >= 1e6) ? value.toExponential(1) : String(Number(value.toPrecision(digits)));
}
const percent = (value) => (value == null ? "–" : `${num(100 * value, 3)} %`);
const signed = (value) => (value == null ? "–" : `${value > 0 ? "+" : ""}${num(value, 3)}`);

const openedGroups = new Map();
/** A group's trajectories, parsed when first asked for; null where the page does not hold them. */
function groupBlock(index) {
  if (!openedGroups.has(index)) {
    const source = byId(`group-${index}`);
    openedGroups.set(index, source ? JSON.parse(source.textContent) : null);
  }
  return openedGroups.get(index);
}

/** Cosines of a probe as Float32Array, decoded from a signed byte each. */
function cosines(probe) {
  if (!probe.decoded && probe.cosines) {
    const raw = atob(probe.cosines);
    probe.decoded = Float32Array.from(raw, (c) => ((c.charCodeAt(0) << 24) >> 24) / 127);
  }
  return probe.decoded || null;
}

// viridis at nine stops
const VIRIDIS = [[68, 1, 84], [72, 40, 120], [62, 74, 137], [49, 104, 142], [38, 130, 142], [31, 158, 137], [53, 183, 121], [110, 206, 88], [253, 231, 37]];
function viridis(t) {
  const x = Math.max(0, Math.min(1, t)) * (VIRIDIS.length - 1);
  const i = Math.min(Math.floor(x), VIRIDIS.length - 2);
  return VIRIDIS[i].map((low, c) => Math.round(low + (x - i) * (VIRIDIS[i + 1][c] - low)));
}
const rgb = (color) => `rgb(${color.join(",")})`;

function range(values) {
  let low = Infinity, high = -Infinity;
  for (const value of values) { if (value < low) low = value; if (value > high) high = value; }
  return [low, high];
}

/** Calls `draw` once, when the element comes near the window. */
const whenSeen = (() => {
  const pending = new Map();
  const observer = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      observer.unobserve(entry.target);
      const draw = pending.get(entry.target);
      pending.delete(entry.target);
      if (draw) draw();
    }
  }, { rootMargin: "300px" });
  return (element, draw) => { pending.set(element, draw); observer.observe(element); };
})();
