"use strict";
// What stands at the top and the bottom, and the order in which the page is set up.

const last = (curve) => { for (let i = curve ? curve[1].length - 1 : -1; i >= 0; i--) if (curve[1][i] != null) return curve[1][i]; return null; };
const firstValue = (curve) => (curve ? curve[1].find((value) => value != null) ?? null : null);
const mean = (values) => (values.length ? values.reduce((a, b) => a + b, 0) / values.length : null);

/** One run: cards. Several: a table, a row a run. */
function setUpCards() {
  const facts = OVERVIEW.runs.map(() => []);
  OVERVIEW.runs.forEach((run, runIdx) => {
    const groups = OVERVIEW.groups.filter((g) => g.run === runIdx), find = (pattern) => Object.keys(run.metrics).find((name) => pattern.test(name));
    const card = (name, value, more, tone = "") => facts[runIdx].push({ name, value, more, tone });
    const change = (curve) => (curve ? `from ${num(firstValue(curve), 3)}, ${curve[0].length} points` : "");
    const heldOutName = find(/^val-core\//), heldOut = run.metrics[heldOutName], reward = run.metrics[find(/^critic\/(score|rewards)\/mean$/)];
    if (heldOut) card(`held-out ${heldOutName.replace("val-core/", "")}`, num(last(heldOut), 3), change(heldOut));
    if (reward) card("reward, sampled", num(last(reward), 3), change(reward));
    const rate = last(run.metrics["latent/frac_rollouts"]) ?? mean(groups.map((g) => (g.spans > 0 ? 1 : 0)));
    if (rate != null) card("trajectories with latents", percent(rate), `${num(last(run.metrics["latent/steps_mean"]) ?? mean(groups.map((g) => g.steps)), 3)} latent steps each`, rate < 0.05 ? "bad" : "");
    const hits = groups.filter((g) => g.hit != null);
    if (hits.length) card("nearest patch in the box", percent(mean(hits.map((g) => g.hit))), `${hits.length} groups; alignment, not quality`);
    const across = last(run.metrics["latent/cosine_across_groups"] || run.metrics["dump/latent_cosine_across_groups"]);
    if (across != null) card("cosine across prompts", num(across, 3), across > 0.98 ? "latents have collapsed" : "1 would be collapse", across > 0.98 ? "bad" : "");
    const verdict = run.ablations.map((report) => report.verdict).filter(Boolean).pop();
    if (verdict) card("latents are", verdict.verdict, verdict.ablation ? `by ablation ${verdict.ablation}` : "there are none", VERDICT_TONES[verdict.verdict]);
    const gap = last(run.metrics["latent/usage_gap/shuffle"]);
    if (gap != null) card("accuracy lost under shuffle", signed(gap), "fixed set, last validation");
    card("dumped", `${num(run.num_trajectories)}`, `trajectories in ${run.num_groups} groups`);
  });
  if (!MANY_RUNS) {
    byId("cards").append(...facts[0].map(({ name, value, more, tone }) =>
      el("div", { class: "card" }, el("div", { class: "name" }, name), el("div", { class: `value ${tone}` }, value), el("div", { class: "more" }, more))));
    return;
  }
  const names = [...new Set(facts.flat().map((fact) => fact.name))];
  byId("cards").classList.add("compared");
  byId("cards").append(el("table", {}, el("thead", {}, el("tr", {}, el("th", {}, "run"), ...names.map((name) => el("th", { class: "number" }, name)))),
    el("tbody", {}, ...OVERVIEW.runs.map((run, i) => el("tr", {}, el("td", {}, run.name), ...names.map((name) => {
      const fact = facts[i].find((f) => f.name === name);
      return el("td", { class: `number ${fact ? fact.tone : ""}`, title: fact ? fact.more : null }, fact ? fact.value : "–");
    }))))));
}

function setUpProblems() {
  for (const run of OVERVIEW.runs) for (const problem of run.problems) byId("problems").append(el("div", { class: "problem" }, MANY_RUNS ? `${run.name}: ${problem}` : problem));
  for (const note of OVERVIEW.notes) byId("groups").querySelector("h2").after(el("p", { class: "note" }, note));
}

function setUpConfig() {
  const keys = [...new Set(OVERVIEW.runs.flatMap((run) => Object.keys(run.config)))].sort();
  const row = (name, values, differs) => el("tr", { class: differs ? "differs" : "" }, el("td", {}, name), ...values.map((value) => el("td", {}, value ?? "–")));
  const rows = keys.map((key) => {
    const values = OVERVIEW.runs.map((run) => run.config[key]);
    return { text: `${key} ${values.join(" ")}`.toLowerCase(), differs: new Set(values).size > 1, make: (differs) => row(key, values, differs), key };
  });
  rows.sort((a, b) => b.key.startsWith("latent.") - a.key.startsWith("latent.")); // what this toolkit adds stands first
  const fixed = [
    ...(MANY_RUNS ? [row("", OVERVIEW.runs.map((run) => run.name))] : []),
    row("checkpoint that read the latents", OVERVIEW.runs.map((run) => run.checkpoint)),
    ...Object.entries(OVERVIEW.versions).map(([name, value]) => row(`${name}, where this page was made`, OVERVIEW.runs.map(() => value))),
  ];
  const fill = () => {
    const text = byId("config-filter").value.trim().toLowerCase(), onlyDiffering = byId("config-differs").checked;
    const kept = rows.filter((r) => (!text || r.text.includes(text)) && (!onlyDiffering || r.differs));
    byId("config-table").querySelector("tbody").replaceChildren(...(text || onlyDiffering ? [] : fixed), ...kept.map((r) => r.make(MANY_RUNS && r.differs)));
  };
  byId("config-filter").addEventListener("input", fill);
  byId("config-differs").addEventListener("change", fill);
  byId("config-differs").parentElement.hidden = !MANY_RUNS;
  whenSeen(byId("config"), fill);
}

setUpProblems();
setUpCards();
setUpGroups();
setUpCurves();
setUpAblations();
setUpConfig();
const firstOpen = OVERVIEW.groups.findIndex((group) => group.open && group.probed);
if (OVERVIEW.groups.length) whenSeen(byId("trajectory"), () => { if (!current) openGroup(Math.max(0, firstOpen), false); });
followLink();
document.body.dataset.ready = "true";
