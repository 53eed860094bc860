// What stands around the charts: the bar of runs and axes, the alarms, every number in words, the settings.

/** Keeps the place of the cursor, and shows the links to its step. */
function look(x) {
  lookedAt = x;
  document.getElementById("looked-at")?.replaceChildren(...lookedPlaces().map(([text, target], i) =>
    make("a", { href: linkTo(target), "data-focus": `looked ${i}` }, text)));
}

function open(x) {
  lookedAt = x;
  const [first] = lookedPlaces();
  if (first) go(first[1]);
}

/** [words, place] of the questions of the step under the cursor, one a run that has some. */
function lookedPlaces() {
  const shown = runsOfPage.map((run, i) => [run, i]).filter(([run, i]) => run.kept.length && !hiddenRuns().includes(i));
  return shown.map(([run, i]) => {
    const step = lookedAt === null ? run.kept.at(-1) : nearest(run.kept, stepAt(run, lookedAt));
    return [`step ${step}${shown.length > 1 ? ` of ${run.name}` : ""}: its questions →`, { view: "tree", run: i, step }];
  });
}

function nearest(values, value) {
  return values.reduce((best, one) => (Math.abs(one - value) < Math.abs(best - value) ? one : best));
}

function runBar(all) {
  const hidden = hiddenRuns();
  const toggle = (i) => go({ hidden: (hidden.includes(i) ? hidden.filter((one) => one !== i) : [...hidden, i]).join(".") }, true);
  const runs = all.runs.map((run, i) =>
    make("label", { class: "run-key" },
      make("input", { type: "checkbox", checked: !hidden.includes(i), onchange: () => toggle(i), "data-focus": `run ${i}` }),
      all.runs.length > 1 ? lineSample({ colour: seriesColour(i) }) : null,
      ` ${run.name}`,
    ));
  const axes = choice("x axis", X_AXES, place.x, (x) => go({ x }, true));
  queueMicrotask(() => look(lookedAt));
  return make("div", { class: "toolbar" },
    all.runs.length > 1 ? make("div", { class: "run-keys", role: "group", "aria-label": "Runs" }, runs) : make("strong", { title: all.runs[0].place }, all.runs[0].name),
    axes,
    all.runs.some((run) => run.columns.step.length > MANY_POINTS) ? make("span", { class: "soft" }, "faint: each step; line: the mean of 2% of the steps") : null,
    make("span", { class: "spacer" }),
    make("span", { id: "looked-at", class: "looked" }),
  );
}

/** A row of buttons of which one is chosen. */
function choice(label, names, chosen, choose) {
  return make("div", { class: "choice", role: "group", "aria-label": label },
    make("span", { class: "choice-label", "aria-hidden": "true" }, label),
    Object.entries(names).map(([name, text]) =>
      make("button", { type: "button", "aria-pressed": String(name === chosen), onclick: () => choose(name), "data-focus": `${label} ${name}` }, text)));
}

/** The alarms of the runs, each once: when it went off, and what it says. */
function alarmList(all, shown) {
  const found = new Map();
  for (const run of shown) {
    for (const [step, name, sentence] of run.alarms) {
      const key = `${all.runs.indexOf(run)} ${name}`;
      const one = found.get(key) ?? { run, name, steps: [] };
      one.steps.push(step);
      one.sentence = sentence;
      found.set(key, one);
    }
  }
  if (!found.size) return null;
  const rows = [...found.values()].map(({ run, name, steps, sentence }) => {
    const at = steps[0] === steps.at(-1) ? `step ${steps[0]}` : `${plural(steps.length, "step")}, ${steps[0]} to ${steps.at(-1)}`;
    const kept = run.kept.length ? nearest(run.kept, steps.at(-1)) : null;
    const target = { view: "tree", run: all.runs.indexOf(run), step: kept };
    return make("tr", {},
      make("th", { scope: "row" }, "▲ ", visible(name.replaceAll("_", " "))),
      shown.length > 1 ? make("td", {}, run.name) : null,
      make("td", { class: "when" }, kept === null ? at : make("a", { href: linkTo(target) }, at)),
      make("td", {}, visible(sentence)));
  });
  return make("section", { class: "alarms", "aria-label": "Alarms" },
    make("table", {}, make("caption", {}, plural(rows.length, "alarm")), make("tbody", {}, rows)));
}

function numbersTable(all, shown) {
  const names = [...new Set(shown.flatMap((run) => Object.keys(run.columns)))].filter((name) => name !== "step");
  const lastOf = (run, name) => run.columns[name]?.findLast((value) => value !== null) ?? null;
  const head = ["number", ...shown.map((run) => (shown.length > 1 ? `last of ${run.name}` : "last")), "what it is", "look for"];
  const rows = names.map((name) => {
    const meaning = all.meanings[name];
    const what = meaning ? [meaning.help, meaning.unit, meaning.over && `over ${meaning.over}`].filter(Boolean).join(", ") : "";
    return make("tr", {}, make("th", { scope: "row" }, name),
      shown.map((run) => make("td", { class: "figure" }, number(lastOf(run, name), 4))),
      make("td", {}, what), make("td", {}, meaning?.watch ?? ""));
  });
  return folded(`Every number in words`, make("table", { class: "list" }, headRow(head), make("tbody", {}, rows)));
}

/** The settings of the runs; where there are several, first those in which they differ. */
function settingsTable(shown) {
  const names = [...new Set(shown.flatMap((run) => Object.keys(run.settings)))];
  if (!names.length) return null;
  const differs = (name) => new Set(shown.map((run) => run.settings[name])).size > 1;
  const ordered = [...names.filter(differs), ...names.filter((name) => !differs(name))];
  const rows = ordered.map((name) =>
    make("tr", { class: differs(name) ? "differs" : null }, make("th", { scope: "row" }, name),
      shown.map((run) => make("td", {}, visible(run.settings[name] ?? "–")))));
  const count = ordered.filter(differs).length;
  const title = shown.length > 1 ? `Settings: ${count ? `${count} differ` : "the same"}` : "Settings";
  return folded(title, make("table", { class: "list" }, headRow(["option", ...shown.map((run) => run.name)]), make("tbody", {}, rows)));
}

function headRow(names) {
  return make("thead", {}, make("tr", {}, names.map((name) => make("th", { scope: "col" }, name))));
}

function folded(title, content) {
  return make("details", { class: "others" }, make("summary", { "data-focus": title }, title), make("div", { class: "wide", tabindex: 0, role: "region", "aria-label": title }, content));
}
