"use strict";
// The contact sheet and the table of groups.

const PAGE = 200, SHEET = 16;
const COLUMNS = [
  ["run", "run", false, (g) => OVERVIEW.runs[g.run].name],
  ["step", "step", true],
  ["group", "group", false],
  ["question", "question", false],
  ["truth", "truth", false],
  ["reward", "reward", true],
  ["reward_std", "reward std", true],
  ["advantage", "max |advantage|", true],
  ["spans", "spans", true],
  ["steps", "latent steps", true],
  ["disagreement", "disagreement", true],
  ["commonest", "commonest text", false],
  ["hit", "in box", true],
].filter(([name]) => (name !== "run" || MANY_RUNS) && (name !== "question" && name !== "hit" || OVERVIEW.groups.some((g) => g[name] != null)));
const TITLES = {
  reward: "mean over the group", reward_std: "0: the group gives no signal", advantage: "largest in the group",
  disagreement: "1 − share of the commonest text", hit: "share of latent steps whose nearest visual token lies in the row's boxes: alignment, not quality",
};
const valueOf = (column, group) => (column[3] ? column[3](group) : group[column[0]]);
const TABLE = { sort: "step", descending: true, shown: PAGE, rows: [] };

function setUpGroups() {
  if (!OVERVIEW.groups.length) {
    byId("groups").append(el("p", { class: "hint" }, "No rollouts to show. Training with latent.dump_every=<steps> dumps them."));
    byId("look").hidden = byId("trajectory").hidden = true;
    return;
  }
  const steps = [...new Set(OVERVIEW.groups.map((g) => g.step))].sort((a, b) => a - b);
  const onchange = () => { TABLE.shown = PAGE; fillTable(); };
  byId("filters").append(...[
    el("input", { id: "filter-text", placeholder: "question, text, group, truth", oninput: onchange }),
    MANY_RUNS ? el("select", { id: "filter-run", onchange }, el("option", { value: "" }, "all runs"), ...OVERVIEW.runs.map((run, i) => el("option", { value: i }, run.name))) : null,
    el("select", { id: "filter-step", onchange }, el("option", { value: "" }, "all steps"), ...steps.map((step) => el("option", { value: step }, `step ${step}`))),
    el("label", {}, "reward ", el("input", { id: "filter-low", type: "number", step: "any", placeholder: "from", style: { width: "70px" }, oninput: onchange }),
      " ", el("input", { id: "filter-high", type: "number", step: "any", placeholder: "to", style: { width: "70px" }, oninput: onchange })),
    el("label", {}, el("input", { id: "filter-signal", type: "checkbox", onchange }), " with signal"),
    el("label", {}, el("input", { id: "filter-disagree", type: "checkbox", onchange }), " disagreeing"),
    el("label", {}, el("input", { id: "filter-probed", type: "checkbox", onchange }), " with heat maps"),
    el("label", {}, el("input", { id: "filter-miss", type: "checkbox", onchange }), " looking outside the box"),
    el("span", { class: "count", id: "count" })].filter(Boolean));
  byId("table").querySelector("thead").append(el("tr", {}, ...COLUMNS.map(([name, title, isNumber]) =>
    el("th", { class: isNumber ? "number" : "", "data-column": name, title: TITLES[name] || "", onclick: () => sortBy(name) }, title))));
  byId("more").addEventListener("click", () => { TABLE.shown += PAGE; fillTable(); });
  fillTable();
  setUpSheet();
}

function sortBy(name) {
  TABLE.descending = TABLE.sort === name ? !TABLE.descending : true;
  TABLE.sort = name;
  fillTable();
}

function filteredGroups() {
  const text = byId("filter-text").value.trim().toLowerCase(), step = byId("filter-step").value, run = MANY_RUNS ? byId("filter-run").value : "";
  const bound = (id, otherwise) => (byId(id).value === "" ? otherwise : Number(byId(id).value));
  const low = bound("filter-low", -Infinity), high = bound("filter-high", Infinity);
  const wants = (id) => byId(id).checked;
  return OVERVIEW.groups.map((group, index) => ({ group, index })).filter(({ group: g }) =>
    (!text || [g.question, g.commonest, g.group, g.truth].some((value) => value != null && String(value).toLowerCase().includes(text))) &&
    (step === "" || g.step === Number(step)) && (run === "" || g.run === Number(run)) && g.reward >= low && g.reward <= high &&
    (!wants("filter-signal") || g.reward_std > 0) && (!wants("filter-disagree") || g.disagreement > 0) &&
    (!wants("filter-probed") || g.probed) && (!wants("filter-miss") || (g.hit != null && g.hit < 1)));
}

function fillTable() {
  const column = COLUMNS.find(([name]) => name === TABLE.sort), sign = TABLE.descending ? -1 : 1;
  const rows = filteredGroups();
  const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true }));
  rows.sort((a, b) => {
    const x = valueOf(column, a.group), y = valueOf(column, b.group);
    if (x == null || y == null) return (x == null) - (y == null); // what is unknown stands last, whatever the order
    return sign * compare(x, y);
  });
  for (const head of document.querySelectorAll("#table th")) {
    const own = head.dataset.column === TABLE.sort, title = COLUMNS.find(([name]) => name === head.dataset.column)[1];
    head.textContent = own ? `${title} ${TABLE.descending ? "▾" : "▴"}` : title;
    head.setAttribute("aria-sort", own ? (TABLE.descending ? "descending" : "ascending") : "none");
  }
  byId("count").textContent = `${rows.length} of ${OVERVIEW.groups.length} groups`;
  byId("table").querySelector("tbody").replaceChildren(...rows.slice(0, TABLE.shown).map(tableRow));
  byId("more").hidden = rows.length <= TABLE.shown;
}

function tableRow({ group, index }) {
  const open = () => openGroup(index);
  return el("tr", { "data-group": index, class: `${group.open ? "can-open" : ""} ${current && current.index === index ? "chosen" : ""}`, tabindex: group.open ? 0 : null,
    title: group.open ? "" : "not in this page, to keep it small", onclick: open, onkeydown: (event) => { if (event.key === "Enter") open(); } },
    ...COLUMNS.map((column) => el("td", { class: column[2] ? "number" : "", title: column[2] ? null : valueOf(column, group) }, num(valueOf(column, group), 3))));
}

/** Pictures of groups over all steps, newest first; nothing is parsed before it comes into view. */
function setUpSheet() {
  const probed = OVERVIEW.groups.map((group, index) => ({ group, index })).filter(({ group }) => group.probed && group.open && group.steps > 0);
  const stride = Math.max(1, probed.length / SHEET);
  const chosen = [...Array(Math.min(SHEET, probed.length)).keys()].map((i) => probed[Math.floor(i * stride)]);
  if (!chosen.length) byId("look").hidden = true;
  for (const { group, index } of chosen) {
    const canvas = el("canvas", { width: 4, height: 4 });
    const text = el("div", { class: "a" }), eyes = el("div", { class: "a" });
    const thumb = el("button", { class: "thumb", onclick: () => openGroup(index) }, canvas,
      el("div", { class: "q" }, group.question ?? ""), text, eyes);
    byId("sheet").append(thumb);
    whenSeen(thumb, () => {
      const block = groupBlock(index), trajectory = block.trajectories.find((t) => t.probes.length), probe = block.probes[trajectory.probes[0]];
      text.append(el("span", {}, `${trajectory.text.trim().slice(0, 60) || "(no text)"}`), group.truth == null ? "" : ` · truth ${group.truth}`);
      eyes.append(`${MANY_RUNS ? OVERVIEW.runs[group.run].name + ", " : ""}step ${group.step} · reward ${num(trajectory.reward, 3)}`,
        probe.hit == null ? "" : el("span", { class: probe.hit ? "good" : "bad" }, probe.hit ? " · in box" : " · outside box"));
      if (block.images.length) drawHeat(canvas, block, topImage(block, probe), probe, { mode: "spotlight", scale: scaleForSheet(probe), size: 300, labels: false });
    });
  }
}

const scaleForSheet = (probe) => (cosines(probe) ? range(cosines(probe)) : [-1, 1]);
