// The frame: tabs, theme, keys, and which view is drawn.

const VIEWS = { run: "Run", tree: "Rollouts", find: "Find" };
const THEMES = { auto: "system", light: "light", dark: "dark" };
const KEYS = [
  ["1 2 3", "run, rollouts, find"], ["j k", "next and previous question"], ["[ ]", "previous and next step"],
  ["t T", "next and previous base trajectory"], ["f F", "next and previous fork"], ["c", "colour by the next number"],
  ["o", "unfold or fold all continuations"], ["n p", "next and previous question that was found"],
  ["← → ↑ ↓", "in a text: from token to token; in a chart: from step to step"], ["{ }", "in a text: to the fork before and after"],
  ["Enter", "in a chart: the questions of its step"], ["/", "find text"], ["Esc", "end a comparison, leave a field"], ["?", "these keys"],
];
const main = document.getElementById("main");
let whole = null; // the part `runs`

/** light or dark, as it is shown now. */
function theme() {
  return document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
}

function setTheme(name) {
  if (name === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  try { localStorage.setItem("fr3e-theme", name); } catch { /* a page of a file may have no storage */ }
  drawPage();
}

function storedTheme() {
  try { return localStorage.getItem("fr3e-theme") ?? "auto"; } catch { return "auto"; }
}

function drawBar() {
  const bar = document.getElementById("bar");
  redraw(bar, `${place.view} ${linkTo({ view: "run" })} ${linkTo({ view: "tree" })} ${storedTheme()} ${theme()}`, () => [
    make("button", { type: "button", class: "skip", onclick: () => main.focus() }, "Skip to the content"),
    make("h1", { class: "brand" }, "fr3e"),
    make("nav", { class: "views", "aria-label": "Views" }, Object.entries(VIEWS).map(([view, text]) =>
      make("a", { href: linkTo({ view }), "aria-current": place.view === view ? "page" : null, "data-focus": `view ${view}` }, text))),
    make("span", { class: "spacer" }),
    make("label", { class: "theme" }, "theme ", make("select", { onchange: (event) => setTheme(event.target.value), "data-focus": "theme" },
      Object.entries(THEMES).map(([name, text]) => make("option", { value: name, selected: name === (document.documentElement.dataset.theme ?? "auto") }, text)))),
    make("button", { type: "button", class: "arrow", onclick: showHelp, "aria-label": "keys", title: "keys (?)", "data-focus": "help" }, "?"),
  ]);
}

function showHelp() {
  const help = document.getElementById("help");
  help.replaceChildren(make("h2", { id: "help-title" }, "Keys"),
    make("table", {}, make("tbody", {}, KEYS.map(([keys, what]) => make("tr", {}, make("th", { scope: "row" }, make("kbd", {}, keys)), make("td", {}, what))))),
    make("form", { method: "dialog" }, make("button", {}, "close")));
  help.showModal();
}

drawPage = () => {
  drawBar();
  if (!whole) return;
  if (!VIEWS[place.view]) place.view = "run";
  if (place.view !== "run") endCharts();
  document.title = `${VIEWS[place.view]} · ${whole.runs.map((run) => run.name).join(", ")}`;
  ({ run: drawRun, tree: drawTree, find: drawFind })[place.view](main, whole);
};

/** Moves to a question of the step, a fork or a trajectory that lies `by` places on. */
function moveQuestion(by) {
  const { index, at } = shownTree;
  const next = index.questions[at + by];
  if (next) go({ query: next.query, round: next.round || "" });
  else announce(by > 0 ? "the last question of this step" : "the first question of this step");
}

function moveState(by) {
  const { states, state } = shownTree;
  const next = states[states.indexOf(state) + by];
  if (!next) return;
  go({ state: next.state, open: "", compare: "" }, true);
  announce(`state ${next.state}, V ${fixed(next.value)}`);
}

function moveTrajectory(by) {
  const { part, trajectory } = shownTree;
  const numbers = part.base.map((row) => row.trajectory);
  const next = numbers[numbers.indexOf(trajectory) + by];
  if (next !== undefined) go({ trajectory: next, state: "", open: "", compare: "", token: "" }, true);
}

function moveStep(by) {
  const { all, run, step } = shownTree;
  const next = all.runs[run].kept[all.runs[run].kept.indexOf(step) + by];
  if (next !== undefined) go({ step: next });
}

function moveFound(by) {
  const { results } = search;
  if (!results.length) return;
  const now = results.findIndex(({ run, step, question }) => String(run) === place.run && String(step) === place.step && String(question.query) === place.query);
  const next = results[now < 0 ? 0 : now + by];
  if (next) go(placeOfRow(next, next.chosen[0]));
}

function cycleColour() {
  const names = Object.keys(COLOURS);
  const next = names[(names.indexOf(place.colour) + 1) % names.length];
  go({ colour: next }, true);
  announce(`colour by ${COLOURS[next]}`);
}

const inTree = (action) => () => place.view === "tree" && shownTree && action();
const ACTIONS = {
  1: () => go({ view: "run" }), 2: () => go({ view: "tree" }), 3: () => go({ view: "find" }),
  j: inTree(() => moveQuestion(1)), k: inTree(() => moveQuestion(-1)),
  "]": inTree(() => moveStep(1)), "[": inTree(() => moveStep(-1)),
  f: inTree(() => moveState(1)), F: inTree(() => moveState(-1)),
  t: inTree(() => moveTrajectory(1)), T: inTree(() => moveTrajectory(-1)),
  c: inTree(cycleColour), o: inTree(() => document.querySelector("[data-focus=unfold]")?.click()),
  n: inTree(() => moveFound(1)), p: inTree(() => moveFound(-1)),
  "/": () => { go({ view: "find" }); document.querySelector("[name=text]")?.focus(); },
  "?": showHelp,
  Escape: () => place.view === "tree" && place.compare && go({ compare: "" }, true),
};

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || document.getElementById("help").open) return;
  const field = event.target.closest?.("input:not([type=checkbox]), select, textarea");
  if (field) {
    if (event.key === "Escape") field.blur();
    return;
  }
  const action = ACTIONS[event.key];
  if (!action) return;
  if (event.key !== "Escape") event.preventDefault();
  action();
});

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawPage());
const stored = storedTheme();
if (stored !== "auto") document.documentElement.dataset.theme = stored;
drawBar();
loadPart("runs").then((part) => {
  whole = part;
  runsOfPage = part.runs;
  drawPage();
}).catch((error) => main.replaceChildren(make("p", { class: "note", role: "alert" }, `The page cannot be read: ${error.message}`)));
