// The tree of a question at a step: its base trajectories, the forks of one, and what was continued there.

let runsOfPage = []; // of the part `runs`
let treeRequest = 0;

/** Draws the view; what is not unpacked yet is waited for. */
async function drawTree(main, all) {
  const request = ++treeRequest;
  const run = Math.max(0, Math.min(Math.trunc(Number(place.run)) || 0, all.runs.length - 1));
  const { kept } = all.runs[run];
  if (!kept.length) {
    redraw(main, `tree none ${run}`, () => [treeHead(all, run, null, null),
      make("p", { class: "note" }, "This run keeps no rollouts. A run with ", make("code", {}, "--record.every 1"), " keeps those of every step.")]);
    return;
  }
  const step = place.step === "" ? kept.at(-1) : nearest(kept, Number(place.step) || 0);
  let index, part, at;
  try {
    index = await loadIndex(run, step);
    const asked = (one) => place.query === "" ? one.split.length : String(one.query) === place.query && (place.round === "" || String(one.round) === place.round);
    at = Math.max(0, index.questions.findIndex(asked));
    part = index.questions.length ? await loadQuestion(run, step, at) : null;
  } catch (error) {
    if (request !== treeRequest) return;
    redraw(main, `tree error ${run} ${step} ${error.message}`, () => [treeHead(all, run, step, null), make("p", { class: "note", role: "alert" }, visible(error.message))]);
    return;
  }
  if (request !== treeRequest || place.view !== "tree") return;
  if (!part) {
    redraw(main, `tree empty ${run} ${step}`, () => [treeHead(all, run, step, null), make("p", { class: "note" }, "No question was asked in this step.")]);
    return;
  }
  if (place.step === "" || place.query === "") keep({ step, query: index.questions[at].query, round: index.questions[at].round || "" });
  redraw(main, "tree", () => make("div", { class: "tree-view" },
    make("div", { id: "tree-head" }),
    make("nav", { id: "questions", "aria-label": "Questions of the step" }),
    make("div", { id: "trunk" }, make("div", { id: "question" }), make("div", { id: "base" }), make("div", { id: "reading" })),
    make("div", { id: "forks" })));
  const here = { all, run, step, index, at, part, ...chosenParts(part) };
  shownTree = here;
  const key = `${run} ${step} ${at} ${facts.where}`;
  redraw(document.getElementById("tree-head"), key, () => treeHead(all, run, step, index));
  redraw(document.getElementById("questions"), key, () => questionList(here));
  redraw(document.getElementById("question"), `${key} ${place.trajectory}`, () => questionCard(here));
  const compared = comparedRows(here);
  redraw(document.getElementById("base"), `${key} ${place.trajectory} ${place.state} ${place.colour} ${compared.map((row) => row.key)}`, () =>
    compared.length === 2 ? comparison(here, compared) : trunk(here));
  redraw(document.getElementById("forks"), `${key} ${place.trajectory} ${place.state} ${place.colour} ${place.open} ${place.compare}`, () => forkPanel(here));
  restoreToken(here);
}

let shownTree = null; // what the keys move through

/** The trajectory and the state that are looked at: by default the first fork whose continuations disagree. */
function chosenParts(part) {
  const numbers = part.base.map((row) => row.trajectory);
  const kept = part.base.filter((row) => row.kept);
  const explored = kept.find((row) => statesOf(part, row.trajectory).some(disagrees)) ?? kept[0] ?? part.base[0];
  const trajectory = numbers.includes(Number(place.trajectory)) && place.trajectory !== "" ? Number(place.trajectory) : explored?.trajectory ?? 0;
  const base = part.base.find((row) => row.trajectory === trajectory) ?? null;
  const states = statesOf(part, trajectory);
  const split = states.find((one) => one.state > 0 && disagrees(one)) ?? states.find(disagrees) ?? states[0];
  const state = states.find((one) => place.state !== "" && one.state === Number(place.state)) ?? split ?? null;
  return { trajectory, base, states, state };
}

function disagrees(state) {
  return new Set(state.rows.map((row) => row.reward)).size > 1;
}

function treeHead(all, run, step, index) {
  const { kept } = all.runs[run];
  const move = (by) => go({ step: kept[Math.max(0, Math.min(kept.length - 1, kept.indexOf(step) + by))] });
  const arrow = (by, text, label) => make("button", { type: "button", class: "arrow", "aria-label": label, title: label, disabled: kept.indexOf(step) + by < 0 || kept.indexOf(step) + by >= kept.length, onclick: () => move(by), "data-focus": label }, text);
  return make("div", { class: "toolbar" },
    all.runs.length > 1
      ? make("label", {}, "run ", make("select", { onchange: (event) => go({ run: event.target.value, step: "" }), "data-focus": "tree run" },
          all.runs.map((one, i) => make("option", { value: i, selected: i === run }, one.name))))
      : null,
    step === null ? null : [arrow(-1, "‹", "previous step"),
      make("label", {}, "step ", make("select", { onchange: (event) => go({ step: event.target.value }), "data-focus": "tree step" },
        kept.map((one) => make("option", { value: one, selected: one === step }, String(one))))),
      arrow(1, "›", "next step")],
    index ? make("span", { class: "soft" }, `${plural(index.questions.length, "question")}, ${plural(index.rows.kind.length, "response")}`) : null,
    step === null ? null : make("span", { class: "soft alarm-here" }, all.runs[run].alarms.filter(([at]) => at === step).map(([, name]) => make("span", { class: "warn" }, "▲ ", visible(name.replaceAll("_", " "))))),
    make("span", { class: "spacer" }),
    make("label", { class: "choice-label", for: "colour" }, "colour by"),
    make("select", { id: "colour", onchange: (event) => go({ colour: event.target.value }, true), "data-focus": "colour" },
      Object.entries(COLOURS).map(([name, text]) => make("option", { value: name, selected: name === place.colour }, text))));
}

/** The questions of a step, each with the share of its right answers and its forks. */
function questionList({ index, at, run, step }) {
  const { kind, right, reward } = index.rows;
  const items = index.questions.map((one, i) => {
    const rows = Array.from({ length: one.count }, (_, k) => one.first + k);
    const base = rows.filter((k) => kind[k] === "base");
    const share = base.filter((k) => right[k]).length;
    const mean = rows.reduce((sum, k) => sum + (reward[k] ?? 0), 0) / Math.max(rows.length, 1);
    return make("li", {},
      make("a", { href: linkTo({ view: "tree", run, step, query: one.query, round: one.round || "" }), class: "question", "aria-current": i === at ? "true" : null, "data-focus": `question ${i}` },
        make("span", { class: "asked", dir: "auto" }, ...brief(one.question || "(no text)", 110)),
        make("span", { class: "facts" },
          make("span", { class: "bar", style: `--v:${mean}`, title: `mean reward ${fixed(mean)}` }),
          make("span", {}, `${share}/${base.length} right`),
          one.split.length ? make("span", { class: "split" }, `${plural(one.split.length, "split state")}`) : null,
          make("span", { class: "source", title: one.source }, ...brief(one.source.split("/").at(-1), 24)))));
  });
  return make("ol", {}, items);
}

/** Question, gold answer and verdict, which stay in sight. */
function questionCard({ part, base, trajectory, run, step }) {
  const long = part.question.length > 400;
  const question = make("p", { class: `asked-whole${long ? " clamp" : ""}`, dir: "auto" }, ...visible(part.question.slice(0, 100_000)));
  const tabs = part.base.map((row) =>
    make("a", { href: linkTo({ view: "tree", run, step, query: part.query, round: part.round || "", trajectory: row.trajectory, state: "", open: "", compare: "", token: "" }), class: `tab ${row.right ? "is-right" : "is-wrong"}`, "aria-current": row.trajectory === trajectory ? "true" : null, "data-focus": `trajectory ${row.trajectory}`, title: row.kept ? "explored: continued from its states" : "not explored" },
      `${row.right ? "✓" : "✗"} r${row.trajectory}`, row.kept ? make("span", { class: "explored" }, " explored") : null));
  return [
    question,
    long ? make("button", { type: "button", class: "more", onclick: (event) => { question.classList.toggle("clamp"); event.target.textContent = question.classList.contains("clamp") ? "whole question" : "less"; } }, "whole question") : null,
    make("dl", { class: "verdict-line" },
      pair("gold answer", make("bdi", { class: "answer" }, ...brief(part.answer ?? "–", 200))),
      base ? pair(`r${trajectory}`, [verdict(base.right), base.stopped ? null : make("span", { class: "warn" }, " cut off")]) : null,
      base ? pair("reward", number(base.reward)) : null,
      base?.extracted ? pair("judged", make("bdi", { class: "answer" }, ...brief(base.extracted, 120))) : null,
      base?.reason ? pair("reason", make("bdi", {}, ...brief(base.reason, 200))) : null,
      pair("query", `${part.query}${part.round ? `, round ${part.round}` : ""}`)),
    make("nav", { class: "tabs", "aria-label": "Base trajectories" }, tabs),
  ];
}

function pair(name, ...value) {
  return make("div", {}, make("dt", {}, name), make("dd", {}, ...value));
}

/** The base trajectory with its forks. */
function trunk({ part, base, states, state, trajectory }) {
  if (!base) return make("p", { class: "note" }, "The base trajectory is not kept.");
  const forks = part.partial.length ? states : [];
  const at = new Map();
  for (const one of forks) at.set(one.position, [...(at.get(one.position) ?? []), one]);
  const chips = (i) => at.has(i) ? make("span", { class: "chips" }, at.get(i).map((one) => forkChip(one, one === state))) : null;
  const text = tokenBox(base, `Base trajectory ${trajectory}`, chips, forks.map((one) => one.position));
  return [forks.length > 1 ? valueStrip(base, forks, state) : null, text, colourLegend(part)];
}

function forkChip(one, chosen) {
  const words = `state ${one.state}, V ${fixed(one.value)}, alpha ${fixed(one.alpha)}, ${one.accepted ? "accepted" : `rejected: ${one.rejected ?? "–"}`}`;
  return make("button", { type: "button", class: `fork${one.accepted ? "" : " rejected"}`, "aria-pressed": String(chosen), "aria-label": words, title: words, style: `--v:${one.value ?? 0}`, onclick: () => go({ state: one.state, open: "", compare: "" }, true), "data-focus": `state ${one.state}` },
    make("b", {}, `S${one.state}`), ` V ${fixed(one.value)} `, make("span", { class: "alpha" }, `α ${fixed(one.alpha)}`));
}

/** V of the states along the trajectory. */
function valueStrip(base, forks, chosen) {
  const wide = 600, high = 54, x = (one) => 14 + (one.position / Math.max(base.tokens, 1)) * (wide - 60), y = (one) => 6 + (1 - Math.max(0, Math.min(1, one.value ?? 0))) * (high - 22);
  // States whose names would lie on that of another have none; the chosen one has.
  const named = new Set(forks.includes(chosen) ? [chosen] : []);
  for (const one of forks) if ([...named].every((other) => Math.abs(x(one) - x(other)) >= 20)) named.add(one);
  const label = `V along the trajectory: ${forks.map((one) => `S${one.state} ${fixed(one.value)} at token ${one.position}`).join(", ")}`;
  return make("svg:svg", { class: "values", viewBox: `0 0 ${wide} ${high}`, role: "img", "aria-label": label },
    [0, 1].map((value) => [make("svg:line", { class: "rule", x1: 14, x2: wide - 40, y1: y({ value }), y2: y({ value }) }), make("svg:text", { class: "tick", x: wide - 34, y: y({ value }) + 4 }, `V ${value}`)]),
    make("svg:polyline", { class: "path", points: forks.map((one) => `${x(one)},${y(one)}`).join(" ") }),
    forks.map((one) => make("svg:g", { class: `point${one === chosen ? " chosen" : ""}`, onclick: () => go({ state: one.state, open: "", compare: "" }, true) },
      make("svg:circle", { cx: x(one), cy: y(one), r: one === chosen ? 5 : 3.5 }),
      named.has(one) ? make("svg:text", { x: x(one), y: high - 2, "text-anchor": "middle" }, `S${one.state}`) : null)));
}

function colourLegend(part) {
  if (place.colour === "none") return null;
  const swatches = ["entropy", "logprob"].includes(place.colour) ? Array.from({ length: LEVELS }, (_, i) => make("span", { class: `t l${i + 1}` }, " ")) : [];
  return make("p", { class: `legend by-${place.colour}` }, swatches.length ? make("span", { class: "swatches", "aria-hidden": "true" }, swatches) : null, ` ${COLOUR_HELP[place.colour](scalesOf(part))}`);
}

/** Shows the token of the address again, and opens what it stands in. */
function restoreToken({ part }) {
  const [key, at] = place.token.split(":");
  const row = key && part.rows.find((one) => one.key === key);
  chosenToken = row ? [row, Number(at)] : null;
  readChosen();
}
