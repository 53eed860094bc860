// Two continuations side by side: the words that only one of them has are marked.

const MOST_CELLS = 16_000_000;

function wordsOf(text) {
  return text.match(/\s+|[\p{L}\p{N}_]+|[^\s\p{L}\p{N}_]/gu) ?? [];
}

/** Which words of a and of b have no partner in a longest common subsequence: [marks of a, marks of b]. */
function wordDifference(a, b) {
  const onlyA = new Uint8Array(a.length).fill(1), onlyB = new Uint8Array(b.length).fill(1);
  let from = 0, endA = a.length, endB = b.length;
  while (from < endA && from < endB && a[from] === b[from]) onlyA[from] = onlyB[from++] = 0;
  while (endA > from && endB > from && a[endA - 1] === b[endB - 1]) onlyA[--endA] = onlyB[--endB] = 0;
  const n = endA - from, m = endB - from;
  if (!n || !m || (n + 1) * (m + 1) > MOST_CELLS) return [onlyA, onlyB];
  const wide = m + 1, length = new Uint16Array((n + 1) * wide);
  for (let i = n - 1; i >= 0; i--) {
    for (let j = m - 1; j >= 0; j--) {
      length[i * wide + j] = a[from + i] === b[from + j]
        ? length[(i + 1) * wide + j + 1] + 1
        : Math.max(length[(i + 1) * wide + j], length[i * wide + j + 1]);
    }
  }
  for (let i = 0, j = 0; i < n && j < m;) {
    if (a[from + i] === b[from + j]) onlyA[from + i++] = onlyB[from + j++] = 0;
    else if (length[(i + 1) * wide + j] >= length[i * wide + j + 1]) i++;
    else j++;
  }
  return [onlyA, onlyB];
}

function markedText(words, only, tag) {
  const nodes = [];
  for (let i = 0; i < words.length;) {
    let end = i;
    while (end < words.length && only[end] === only[i]) end++;
    const text = words.slice(i, end).join("");
    nodes.push(...(only[i] ? [make(tag, {}, ...visible(text))] : visible(text)));
    i = end;
  }
  return nodes;
}

/** The section that stands in place of the base trajectory while two continuations are compared. */
function comparison({ part }, rows) {
  const texts = rows.map((row) => wordsOf(row.text.slice(0, 400_000)));
  const marks = wordDifference(...texts);
  const same = marks[0].reduce((sum, only) => sum + (only ? 0 : 1), 0);
  const total = Math.max(texts[0].length, texts[1].length, 1);
  const column = (row, i) => make("section", { class: "compared", "aria-label": `continuation ${row.rollout ?? row.trajectory}` },
    make("h3", {}, row.kind === "base" ? `r${row.trajectory}` : `S${row.state} m${row.rollout}`, " ", verdict(row.right), make("span", { class: "soft" }, ` reward ${number(row.reward)} · judged `), make("bdi", { class: "answer" }, ...brief(row.extracted ?? "–", 40))),
    make("p", { class: "reason" }, "gold ", make("bdi", { class: "answer" }, ...brief(part.answer ?? "–", 60)), !row.reason ? "" : [" · ", make("bdi", {}, ...brief(row.reason, 200))]),
    make("div", { class: "tokens", dir: "auto", tabindex: 0, role: "region", "aria-label": `text of ${row.rollout ?? row.trajectory}` }, ...markedText(texts[i], marks[i], i ? "ins" : "del")));
  return [
    make("div", { class: "compare-head" },
      make("h2", {}, "Compared word by word"), make("span", { class: "soft" }, `${Math.round((100 * same) / total)}% of the words are the same`),
      make("button", { type: "button", onclick: () => go({ compare: "" }, true), "data-focus": "end compare" }, "back to the base trajectory")),
    make("div", { class: "two" }, rows.map(column)),
  ];
}
