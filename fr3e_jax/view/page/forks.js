// A fork: the state, and its continuations by reward, folded.

function openRows() {
  return new Set(place.open ? place.open.split(",") : []);
}

function comparedKeys() {
  return place.compare ? place.compare.split(",") : [];
}

function comparedRows({ part }) {
  return comparedKeys().map((key) => part.rows.find((row) => row.key === key)).filter(Boolean);
}

/** The panel of the chosen state. */
function forkPanel(here) {
  const { part, state, states, base } = here;
  if (!state) return make("p", { class: "note" }, base?.kept === false && part.partial.length ? "This trajectory is not explored: it has no states." : "There are no states here.");
  const restarts = part.partial.length > 0;
  const right = state.rows.filter((row) => row.right).length;
  const before = states[states.indexOf(state) - 1];
  const change = before && state.value !== null ? state.value - before.value : null;
  const word = state.state === 0 || !base ? null : tokenText(base, state.position);
  const rows = byReward(state.rows);
  return [
    make("header", { class: "fork-head" },
      make("h2", {}, restarts ? `State ${state.state}` : "Rollouts of the query", restarts ? make("span", { class: "soft" }, state.state === 0 ? ", the bare query" : ` before token ${state.position + 1} of ${base?.tokens ?? "–"}, `, word === null ? null : make("code", {}, ...visible(JSON.stringify(word.slice(0, 30))))) : null),
      make("dl", { class: "verdict-line" },
        pair("V", fixed(state.value)),
        change === null ? null : pair("change", `${change > 0 ? "+" : ""}${fixed(change)}`),
        restarts ? pair("alpha", fixed(state.alpha)) : null,
        state.statistic === null ? null : pair("statistic", number(state.statistic)),
        pair("right", `${right} of ${rows.length}`),
        pair("trained", state.accepted ? "yes" : `no: ${state.rejected ?? "not accepted"}`)),
      make("div", { class: "fork-tools" },
        make("button", { type: "button", onclick: () => go({ open: place.open ? "" : rows.map((row) => row.key).join(",") }, true), "data-focus": "unfold" }, place.open ? "fold all" : "unfold all"),
        make("span", { class: "soft" }, comparedKeys().length === 1 ? "choose another one to compare" : rows.length > 1 ? "tick two to compare them" : ""))),
    make("ol", { class: "continuations" }, rows.map((row) => continuation(row, here))),
  ];
}

/** The end of the prefix that a continuation goes on from. */
function prefixEnd(row, base) {
  if (!base || !row.position) return null;
  const prefix = base.text.slice(0, startsOf(base)[row.position]);
  return make("p", { class: "prefix", title: "the end of the base trajectory before the state" }, prefix.length > 80 ? "…" : "", make("bdi", {}, ...visible(prefix.slice(-80).replace(/^[\udc00-\udfff]/, ""))));
}

function continuation(row, { part, base }) {
  const open = openRows().has(row.key);
  const ticked = comparedKeys().includes(row.key);
  const name = row.kind === "base" ? `r${row.trajectory}` : `m${row.rollout}`;
  const toggle = () => {
    const keys = openRows();
    if (!keys.delete(row.key)) keys.add(row.key);
    go({ open: [...keys].join(",") }, true);
  };
  const compare = () => {
    const keys = comparedKeys();
    go({ compare: (ticked ? keys.filter((key) => key !== row.key) : [...keys, row.key].slice(-2)).join(",") }, true);
  };
  return make("li", { class: `continuation ${row.right ? "is-right" : "is-wrong"}` },
    make("div", { class: "line" },
      make("input", { type: "checkbox", checked: ticked, onchange: compare, "aria-label": `compare ${name}`, "data-focus": `compare ${row.key}` }),
      make("button", { type: "button", class: "unfold", "aria-expanded": String(open), onclick: toggle, "data-focus": `open ${row.key}` },
        make("span", { class: "name" }, name), " ",
        verdict(row.right), make("span", { class: "figures" }, ` reward ${number(row.reward)}`, row.advantage === null ? "" : ` · A ${row.advantage > 0 ? "+" : ""}${fixed(row.advantage)}`, ` · ${plural(row.tokens, "token")}`),
        row.stopped ? null : make("span", { class: "warn" }, " cut off"),
        make("span", { class: "judged" }, !row.extracted ? "" : [" ", make("bdi", { class: "answer" }, ...brief(row.extracted, 40))]),
        open ? null : make("span", { class: "preview" }, make("bdi", {}, ...brief(row.text, 110))))),
    open
      ? make("div", { class: "unfolded" },
          make("p", { class: "reason" }, "gold ", make("bdi", { class: "answer" }, ...brief(part.answer ?? "–", 60)), !row.reason ? "" : [" · ", make("bdi", {}, ...brief(row.reason, 300))]),
          prefixEnd(row, base),
          tokenBox(row, `Continuation ${name}`))
      : null);
}
