"use strict";
// One group: the image and a latent step's facts on the left, the group's trajectories beside it.

const KIND_NAMES = { T: "sampled token", S: "span start, sampled", F: "token set by the mechanism", L: "latent step", V: "latent step, an image embedding that attention chose", M: "sampled token, fed with a recorded vector" };
const STEP_COLORS = {
  cosine: ["nearest patch's cosine", (probe) => (cosines(probe) ? cosines(probe)[probe.top] : null)],
  norm: ["norm", (probe) => probe.norm],
  gap: ["state error", (probe) => probe.gap],
};
const TOKEN_COLORS = {
  none: ["nothing", null],
  surprise: ["−log-prob (old)", (p) => (p.old == null ? null : -p.old)],
  replay: ["|rollout − old|", (p) => (p.old == null || p.rollout == null ? null : Math.abs(p.rollout - p.old))],
  drift: ["|old − ref|", (p) => (p.ref == null || p.old == null ? null : Math.abs(p.old - p.ref))],
  change: ["|checkpoint − old|", (p) => (p.new == null || p.old == null ? null : Math.abs(p.new - p.old))],
};
// kept from one group to the next
const VIEW = { mode: "heat", scale: "step", stepColor: "cosine", tokenColor: "none" };
let current = null;

function openGroup(index, scroll = true) {
  const block = groupBlock(index);
  if (!block) return false;
  current = { index, block, summary: OVERVIEW.groups[index], trajectory: null, latent: null, imageIdx: 0, probe: null };
  for (const row of document.querySelectorAll("#table tr.chosen")) row.classList.remove("chosen");
  const row = document.querySelector(`#table tr[data-group="${index}"]`);
  if (row) row.classList.add("chosen");
  buildViewer();
  const first = block.trajectories.findIndex((trajectory) => trajectory.probes.length);
  if (first >= 0) chooseStep(first, 0);
  if (scroll) byId("trajectory").scrollIntoView();
  return true;
}

function buildViewer() {
  const { block, summary } = current;
  const list = el("div", {});
  const viewer = el("div", { class: "viewer" }, eye(block), list);
  const stepColors = block.probes.some((probe) => probe.gap != null) ? STEP_COLORS : { cosine: STEP_COLORS.cosine, norm: STEP_COLORS.norm };
  if (!stepColors[VIEW.stepColor]) VIEW.stepColor = "cosine";
  const same = block.trajectories.length > 1 && block.probes.length && new Set(block.trajectories.map((t) => t.probes.join())).size === 1;
  list.append(
    el("h3", {}, `${MANY_RUNS ? OVERVIEW.runs[summary.run].name + ", " : ""}step ${summary.step}, group ${summary.group} `,
      same ? el("span", { class: "badge", title: "Deterministic latents: the group explores text only" }, "one set of latents in the whole group") : null),
    el("div", { class: "prompt" }, block.prompt ?? "(the prompt's row was not read: this group is not among the probed ones)"),
    el("div", { class: "filters" }, el("span", {}, "truth ", el("b", {}, summary.truth ?? "–")),
      chooser("colour steps by", stepColors, "stepColor", paintSteps), chooser("colour tokens by", TOKEN_COLORS, "tokenColor", paintTokens)),
    el("div", { class: "legend", id: "viewer-legend" },
      el("span", {}, el("span", { class: "shown-marker" }, "<start>"), " set by the mechanism, or a span's start"),
      el("span", {}, el("span", { class: "strip" }, el("span", { class: "shown-step" }, "0")), " latent step, by its number"),
      el("span", { id: "step-scale" }), el("span", { id: "token-scale" })),
    el("div", { class: "reading", id: "reading" }, "Choose a token for its log-probs, a latent step for what it looks at. ",
      el("kbd", {}, "←"), " ", el("kbd", {}, "→"), " go along the latent steps, ", el("kbd", {}, "j"), " ", el("kbd", {}, "k"), " to the next and the last group of the table."));
  list.append(el("div", { class: "side-by-side" }, ...block.trajectories.map(trajectoryCard)));
  byId("viewer").replaceChildren(viewer);
  paintSteps();
  paintTokens();
  showStep();
}

function chooser(label, options, key, onchange) {
  const select = el("select", { "data-view": key, onchange: () => { VIEW[key] = select.value; onchange(); } },
    ...Object.entries(options).map(([value, [name]]) => el("option", { value, selected: VIEW[key] === value }, name)));
  return el("label", {}, `${label} `, select);
}

function trajectoryCard(trajectory, i) {
  const sign = trajectory.advantage > 0 ? "good" : trajectory.advantage < 0 ? "bad" : "";
  const head = el("div", { class: "head" }, el("a", { class: "link", href: linkTo(current.summary, trajectory), title: "a link that opens this trajectory" }, el("b", {}, `#${trajectory.idx}`)),
    el("span", {}, "reward ", el("b", {}, num(trajectory.reward))),
    el("span", {}, "advantage ", el("b", { class: sign }, signed(trajectory.advantage))),
    ...Object.entries({ ...trajectory.terms, ...trajectory.numbers }).map(([name, value]) => el("span", {}, `${name} `, el("b", {}, num(value)))),
    trajectory.stop === "eos" ? null : el("span", { class: "bad" }, `stopped by ${trajectory.stop || "?"}`));
  const completion = el("div", { class: "completion" });
  let latent = 0, strip = null;
  [...trajectory.kinds].forEach((kind, position) => {
    if (kind === "L" || kind === "V") {
      if (!strip) completion.append((strip = el("span", { class: "strip" })));
      const latentIdx = latent++;
      strip.append(el("button", { class: "step", "data-trajectory": i, "data-latent": latentIdx, title: `latent step ${latentIdx}`, onclick: () => chooseStep(i, latentIdx) }, latentIdx));
      return;
    }
    strip = null;
    if (kind === "M") latent++;  // it has a recorded vector and so a probe, but is read as text
    const marker = kind !== "T" && kind !== "M" ? " marker" : "";
    completion.append(el("button", { class: `token${marker}`, "data-trajectory": i, "data-position": position, onclick: () => chooseToken(i, position) }, trajectory.tokens[position] || "∅"));
    if (marker || !/\s$/.test(trajectory.tokens[position])) completion.append(document.createElement("wbr"));
  });
  return el("div", { class: "trajectory", "data-card": i }, head, completion);
}

function probeOf(trajectoryIdx, latentIdx) {
  return current.block.probes[current.block.trajectories[trajectoryIdx].probes[latentIdx]];
}

function tokenLogProbs(trajectory, position) {
  return Object.fromEntries(Object.entries(trajectory.log_probs).map(([name, values]) => [name, values[position]]));
}

function chooseStep(trajectoryIdx, latentIdx) {
  Object.assign(current, { trajectory: trajectoryIdx, latent: latentIdx, probe: probeOf(trajectoryIdx, latentIdx) });
  if (current.block.images.length) current.imageIdx = topImage(current.block, current.probe);
  for (const node of document.querySelectorAll("#viewer .step.chosen, #viewer .token.chosen, #viewer .trajectory.chosen")) node.classList.remove("chosen");
  const button = document.querySelector(`#viewer .step[data-trajectory="${trajectoryIdx}"][data-latent="${latentIdx}"]`);
  button.classList.add("chosen");
  button.closest(".trajectory").classList.add("chosen");
  button.scrollIntoView({ block: "nearest" });
  showStep();
}

function chooseToken(trajectoryIdx, position) {
  const trajectory = current.block.trajectories[trajectoryIdx], p = tokenLogProbs(trajectory, position);
  for (const node of document.querySelectorAll("#viewer .token.chosen")) node.classList.remove("chosen");
  document.querySelector(`#viewer .token[data-trajectory="${trajectoryIdx}"][data-position="${position}"]`).classList.add("chosen");
  const acted = trajectory.acted[position] === "1", parts = [el("b", {}, JSON.stringify(trajectory.tokens[position])), ` position ${position}, ${KIND_NAMES[trajectory.kinds[position]]}`];
  if (!acted) parts.push(", no action: it has no part in the loss");
  const titles = { rollout: "rollout", old: "old", ref: "reference", new: "checkpoint" };
  for (const [name, title] of Object.entries(titles)) if (acted && p[name] != null) parts.push(` · ${title} `, el("b", {}, p[name].toFixed(4)));
  for (const [name, values] of Object.entries(trajectory.recorded || {})) parts.push(` · ${name} `, el("b", {}, num(values[position])));
  if (acted && p.old != null && p.rollout != null) parts.push(` · rollout − old ${num(p.rollout - p.old, 2)}`);
  if (acted && p.old != null && p.ref != null) parts.push(` · old − reference ${num(p.old - p.ref, 2)}`);
  byId("reading").replaceChildren(...parts);
}

/** What a colour means: its name, and a bar from the least to the most. */
function scaleLegend(id, name, low, high, colors) {
  byId(id).replaceChildren(...(name == null || low == null || low > high ? [] : [`${name} ${num(low, 3)} `,
    el("span", { class: "bar", style: { background: `linear-gradient(90deg, ${colors.join(",")})` } }), ` ${num(high, 3)}`]));
}

/** Colours of the strips' buttons, over the range within the group. */
function paintSteps() {
  const [name, read] = STEP_COLORS[VIEW.stepColor];
  const values = current.block.probes.map(read), [low, high] = range(values.filter((v) => v != null));
  scaleLegend("step-scale", `latent steps: ${name}`, low, high, VIRIDIS.map(rgb));
  for (const button of document.querySelectorAll("#viewer .step")) {
    const value = read(probeOf(button.dataset.trajectory, button.dataset.latent));
    const t = high > low ? (value - low) / (high - low) : 0.45;
    button.style.background = value == null ? "#8a93a0" : rgb(viridis(t));
    button.style.color = value != null && t > 0.7 ? "#000" : "#fff";
    button.title = `latent step ${button.dataset.latent}: ${STEP_COLORS[VIEW.stepColor][0]} ${num(value)}`;
  }
}

function paintTokens() {
  const read = TOKEN_COLORS[VIEW.tokenColor][1];
  const buttons = [...document.querySelectorAll("#viewer .token")];
  const values = buttons.map((button) => {
    const trajectory = current.block.trajectories[button.dataset.trajectory], position = button.dataset.position;
    return read && trajectory.acted[position] === "1" ? read(tokenLogProbs(trajectory, position)) : null;
  });
  const high = range(values.filter((v) => v != null))[1];
  scaleLegend("token-scale", read && `tokens: ${TOKEN_COLORS[VIEW.tokenColor][0]}, nats`, 0, high, ["rgba(209,102,11,0)", "rgba(209,102,11,0.75)"]);
  buttons.forEach((button, i) => {
    button.style.background = values[i] == null ? "" : `rgba(209,102,11,${(0.75 * values[i]) / Math.max(high, 1e-9)})`;
    button.title = values[i] == null ? "" : `${TOKEN_COLORS[VIEW.tokenColor][0]}: ${num(values[i])}`;
  });
}

function eye(block) {
  if (!block.images.length) {
    return el("div", { class: "eye" }, el("p", { class: "hint" }, "No image: this group was not probed, or its prompt has none. `--probe` raises how many groups are."), el("div", { id: "facts" }));
  }
  const canvas = el("canvas", { class: "main", id: "heat" });
  canvas.addEventListener("mousemove", (event) => {
    const at = cosineAt(event, canvas, current.block, current.imageIdx, current.probe);
    canvas.title = at ? `row ${at.row}, column ${at.column}: cosine ${at.cosine.toFixed(3)}` : "";
  });
  const modes = { heat: ["heat map"], spotlight: ["spotlight"], off: ["image only"] };
  const scales = { step: ["this step"], group: ["this group"], fixed: ["−1 to 1"] };
  const images = block.images.map((_, i) => [i, [`image ${i + 1}`]]);
  const picker = images.length > 1
    ? el("select", { id: "image-picker", onchange: (event) => { current.imageIdx = Number(event.target.value); showStep(); } }, ...images.map(([i, [name]]) => el("option", { value: i }, name)))
    : null;
  return el("div", { class: "eye" }, canvas,
    el("div", { class: "controls" }, chooser("", modes, "mode", showStep), chooser("scale", scales, "scale", showStep), picker),
    el("div", { class: "scale" }, el("span", { id: "low" }), el("div", { class: "bar", style: { background: `linear-gradient(90deg, ${VIRIDIS.map(rgb).join(",")})` } }), el("span", { id: "high" })),
    el("p", { class: "hint" }, "Cosine of the latent to each visual token. ", el("span", { class: "frame nearest" }), " the nearest",
      block.boxes.length ? el("span", {}, "; ", el("span", { class: "frame box" }), " the row's box") : "", "."),
    el("div", { id: "facts" }));
}

function scaleOf(block, probe) {
  if (VIEW.scale === "fixed" || !probe || !cosines(probe)) return [-1, 1];
  if (VIEW.scale === "step") return range(cosines(probe));
  return range(block.probes.map(cosines).filter(Boolean).flatMap((values) => [...range(values)]));
}

function showStep() {
  const { block, probe } = current, canvas = byId("heat");
  if (canvas) {
    const scale = scaleOf(block, probe);
    byId("low").textContent = `cosine ${scale[0].toFixed(2)}`;
    byId("high").textContent = scale[1].toFixed(2);
    if (byId("image-picker")) byId("image-picker").value = current.imageIdx;
    drawHeat(canvas, block, current.imageIdx, probe, { mode: VIEW.mode, scale, size: 720, labels: true });
  }
  if (!probe) return;
  const facts = [["latent step", `${current.latent} of trajectory #${block.trajectories[current.trajectory].idx}`], ["norm", num(probe.norm)]];
  if (probe.gap != null) facts.push(["state error", `${num(probe.gap, 2)} (relative distance to what this checkpoint makes of the recorded prefix)`]);
  if (cosines(probe)) facts.push(["nearest patch", `cosine ${cosines(probe)[probe.top].toFixed(3)}${probe.hit == null ? "" : probe.hit ? ", in the box" : ", outside the box"}`]);
  for (const [name, values] of Object.entries(probe.recorded || {})) facts.push([name, values.map((value) => num(value, 3)).join(", ")]);
  const list = el("dl", { class: "facts" }, ...facts.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
  const words = probe.lens ? el("div", { class: "words" }, wordList("Logit lens, probability", probe.lens), wordList("Nearest embeddings, cosine", probe.nearest)) : null;
  byId("facts").replaceChildren(...[list, words].filter(Boolean));
}

function wordList(title, words) {
  return el("div", {}, el("div", { class: "hint" }, title),
    ...words.map(([token, score]) => el("div", { class: "word" }, el("i", { style: { width: `${100 * Math.max(0, Math.min(1, score))}%` } }), el("span", { title: token }, token), el("span", {}, num(score, 2)))));
}

const isTyping = (target) => /^(INPUT|SELECT|TEXTAREA)$/.test(target.tagName || "");

document.addEventListener("keydown", (event) => {
  if (isTyping(event.target) || event.ctrlKey || event.metaKey || event.altKey) return;
  const forward = { ArrowRight: 1, ArrowLeft: -1 }[event.key], down = { j: 1, k: -1 }[event.key];
  if (forward && current && current.latent != null) {
    const steps = [...document.querySelectorAll("#viewer .step")];
    const next = steps[steps.findIndex((step) => step.classList.contains("chosen")) + forward];
    if (next) { event.preventDefault(); next.click(); }
  }
  if (down) {
    const rows = [...document.querySelectorAll("#table tbody tr.can-open")].map((row) => Number(row.dataset.group));
    const next = rows[current ? rows.indexOf(current.index) + down : 0];
    if (next != null) openGroup(next);
  }
});

// ---- links ------------------------------------------------------------------------------------

/** `#at=run/step/group/trajectory`: names, so that the link holds in a page that is made anew. */
const linkTo = (group, trajectory) => `#at=${[OVERVIEW.runs[group.run].name, group.step, group.group, trajectory.idx].map(encodeURIComponent).join("/")}`;

/** Opens what the address names; says so where this page does not hold it. */
function followLink() {
  if (!location.hash.startsWith("#at=")) return;
  const parts = location.hash.slice(4).split("/").map(decodeURIComponent), [run, step, group, idx] = parts;
  const index = OVERVIEW.groups.findIndex((g) => OVERVIEW.runs[g.run].name === run && String(g.step) === step && String(g.group) === group);
  const place = index >= 0 && openGroup(index) ? current.block.trajectories.findIndex((t) => String(t.idx) === idx) : -1;
  byId("missed").replaceChildren(...(place >= 0 ? [] : [el("div", { class: "problem" }, `This page does not hold what the link names: ${parts.join(", ")}.`)]));
  if (place < 0) return;
  if (current.block.trajectories[place].probes.length && document.querySelector(`#viewer .step[data-trajectory="${place}"]`)) {
    chooseStep(place, Number(document.querySelector(`#viewer .step[data-trajectory="${place}"]`).dataset.latent));
  }
  for (const card of document.querySelectorAll("#viewer .trajectory")) card.classList.toggle("linked", Number(card.dataset.card) === place);
  document.querySelector(`#viewer .trajectory[data-card="${place}"]`).scrollIntoView({ block: "center" });
}
window.addEventListener("hashchange", followLink);
