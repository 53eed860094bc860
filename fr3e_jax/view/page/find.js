// Find: by step, question, reward, source, split states, and by text in everything that is kept.

const MOST_FOUND = 300;
let search = { signature: "", results: [], done: true, looked: 0 };

function drawFind(main, all) {
  redraw(main, "find", () => make("div", { class: "find-view" },
    findForm(all), make("p", { id: "found", class: "soft", role: "status" }), make("ol", { id: "results", class: "results" })));
  const signature = ["text", "where", "from", "to", "source", "least", "most", "kind", "right", "split"].map((name) => place[name]).join("\n");
  if (search.signature !== signature) startSearch(signature, all);
  else showResults();
}

function findForm(all) {
  const field = (name, label, attributes) => make("label", {}, label, make("input", { name, value: place[name], autocomplete: "off", "data-focus": `find ${name}`, ...attributes }));
  const select = (name, label, options) => make("label", {}, label, make("select", { name, "data-focus": `find ${name}` },
    Object.entries(options).map(([value, text]) => make("option", { value, selected: place[name] === value }, text))));
  let waiting;
  const read = () => {
    const given = new FormData(form);
    const next = Object.fromEntries(["text", "where", "from", "to", "source", "least", "most", "kind", "right"].map((name) => [name, given.get(name).trim()]));
    go({ ...next, split: given.get("split") ? "yes" : "" }, true);
  };
  const form = make("form", { role: "search", onsubmit: (event) => { event.preventDefault(); read(); }, oninput: () => { clearTimeout(waiting); waiting = setTimeout(read, 250); } },
    field("text", "text", { type: "search", class: "long", placeholder: "words of a question or a response" }),
    select("where", "in", { anywhere: "question and response", question: "question", response: "response" }),
    field("from", "from step", { type: "number", min: 0 }), field("to", "to step", { type: "number", min: 0 }),
    field("least", "reward from", { type: "number", step: "any" }), field("most", "to", { type: "number", step: "any" }),
    select("right", "verdict", { "": "any", yes: "right", no: "wrong" }),
    select("kind", "response", { "": "any", base: "base trajectory", partial: "partial rollout" }),
    field("source", "source", { placeholder: "any" }),
    make("label", { class: "tick" }, make("input", { type: "checkbox", name: "split", checked: place.split === "yes", "data-focus": "find split" }), "states whose continuations disagree"));
  return form;
}

/** Goes through all steps that are kept, the latest first, and shows what it finds as it goes. */
async function startSearch(signature, all) {
  const own = (search = { signature, results: [], done: false, looked: 0, failed: 0 });
  const wanted = { ...place, text: place.text.toLowerCase() };
  for (const name of ["from", "to", "least", "most"]) if (!Number.isFinite(Number(wanted[name]))) wanted[name] = "";
  const steps = all.runs.flatMap((run, i) => run.kept.map((step) => [i, step]))
    .filter(([, step]) => (wanted.from === "" || step >= Number(wanted.from)) && (wanted.to === "" || step <= Number(wanted.to)))
    .sort((a, b) => b[1] - a[1] || a[0] - b[0]);
  own.total = steps.length;
  showResults();
  for (const [run, step] of steps) {
    try {
      const index = await loadIndex(run, step);
      for (let i = 0; i < index.questions.length; i++) {
        if (own !== search) return;
        await searchQuestion(own, wanted, run, step, index, i);
        if (own.results.length >= MOST_FOUND) break;
      }
    } catch {
      own.failed++;
    }
    own.looked++;
    if (own !== search) return;
    if (own.results.length >= MOST_FOUND) break;
    showResults();
  }
  own.done = true;
  showResults();
}

async function searchQuestion(own, wanted, run, step, index, i) {
  const question = index.questions[i], { rows } = index;
  if (wanted.source && !question.source.toLowerCase().includes(wanted.source.toLowerCase())) return;
  const split = new Set(question.split.map(([trajectory, state]) => `${trajectory} ${state}`));
  const fits = (k) =>
    (wanted.least === "" || (rows.reward[k] ?? -Infinity) >= Number(wanted.least)) && (wanted.most === "" || (rows.reward[k] ?? Infinity) <= Number(wanted.most)) &&
    (wanted.right === "" || rows.right[k] === (wanted.right === "yes")) && (wanted.kind === "" || rows.kind[k] === wanted.kind) &&
    (!wanted.split || (rows.state[k] !== null && (split.has(`${rows.trajectory[k]} ${rows.state[k]}`) || (rows.kind[k] === "base" && split.has(`0 ${rows.state[k]}`)))));
  const candidates = Array.from({ length: question.count }, (_, k) => question.first + k).filter(fits);
  if (!candidates.length) return;
  const texts = { question: null, found: new Map() };
  let chosen = candidates;
  if (wanted.text) {
    const all = await loadPart(`${run}/${step}/texts`);
    const at = wanted.where === "response" ? -1 : all.questions[i].toLowerCase().indexOf(wanted.text);
    texts.question = at < 0 ? null : [all.questions[i], at];
    if (wanted.where !== "question") {
      for (const k of candidates) {
        const text = all.texts[k], where = text.toLowerCase().indexOf(wanted.text);
        if (where >= 0) texts.found.set(k, [text, where]);
      }
    }
    if (texts.question === null) chosen = candidates.filter((k) => texts.found.has(k));
    if (!chosen.length) return;
  }
  own.results.push({ run, step, question, rows, chosen, texts, wanted });
}

/** Words around a place in a text, with what was found marked. */
function snippet([text, at], length) {
  const from = Math.max(0, at - 50), end = at + length;
  return [from ? "…" : "", ...brief(text.slice(from, at), 60), " ".repeat(/\s$/.test(text.slice(from, at)) ? 1 : 0), make("mark", {}, ...visible(text.slice(at, end))), ...visible(text.slice(end, end + 70).replace(/\s+/g, " ")), text.length > end + 70 ? "…" : ""];
}

function placeOfRow({ run, step, question, rows }, k) {
  const partial = rows.kind[k] === "partial";
  const key = partial ? `r${rows.trajectory[k]}.${rows.state[k]}.${rows.rollout[k]}` : "";
  return { view: "tree", run, step, query: question.query, round: question.round || "", trajectory: rows.trajectory[k] ?? "", state: rows.state[k] ?? "", open: key, compare: "", token: "" };
}

function showResults() {
  const status = document.getElementById("found"), list = document.getElementById("results");
  if (!status) return;
  const count = search.results.length;
  const many = count >= MOST_FOUND ? `the first ${count} questions; ask for less to see others` : `${plural(count, "question")}${search.done ? "" : ` so far; ${search.looked} of ${plural(search.total, "step")} looked through`}`;
  status.textContent = many + (search.failed ? `; ${plural(search.failed, "step")} could not be read` : "");
  while (list.children.length > count || (list.children.length && list.searched !== search)) list.lastChild.remove();
  list.searched = search;
  for (let i = list.children.length; i < count; i++) list.append(resultItem(search.results[i]));
}

function resultItem(found) {
  const { run, step, question, rows, chosen, texts, wanted } = found;
  const link = (k, ...content) => make("a", { href: linkTo(placeOfRow(found, k)) }, content);
  const named = (k) => rows.kind[k] === "base" ? `r${rows.trajectory[k]}` : `r${rows.trajectory[k]} S${rows.state[k]} m${rows.rollout[k]}`;
  const shown = wanted.text && texts.found.size ? chosen.filter((k) => texts.found.has(k)) : chosen;
  return make("li", {},
    make("p", { class: "result-head" },
      make("a", { href: linkTo({ ...placeOfRow(found, chosen[0]), ...(shown === chosen && !wanted.split ? { trajectory: "", state: "", open: "" } : {}) }), class: "asked", dir: "auto" }, ...(texts.question ? snippet(texts.question, wanted.text.length) : brief(question.question || "(no text)", 150))),
      make("span", { class: "soft" }, ` ${runsOfPage.length > 1 ? `${runsOfPage[run].name} · ` : ""}step ${step} · `, ...brief(question.source, 40), " · gold ", make("bdi", { class: "answer" }, ...brief(question.answer, 40)), ` · ${plural(chosen.length, "response")}`)),
    make("ul", {}, shown.slice(0, 6).map((k) => make("li", {}, link(k, make("span", { class: "name" }, named(k)), " ", verdict(rows.right[k]), ` ${number(rows.reward[k])}`), texts.found.has(k) ? [" ", make("bdi", {}, ...snippet(texts.found.get(k), wanted.text.length))] : null)),
      shown.length > 6 ? make("li", { class: "soft" }, `and ${shown.length - 6} more there`) : null));
}
