"use strict";
/* The pair browser: which features are entangled, what became of them in the twin, where they meet and where they part. */
(() => {
  const {h, number, load, page, context, texts} = unbraid;
  const FIELDS = ["i", "j", "correlation", "together", "firesI", "firesJ", "cosine", "twinI", "twinJ", "matchI", "matchJ", "twinCorrelation", "calm", "twinCalm", "where", "large"];
  const read = (row, at) => Object.fromEntries([["at", at], ...FIELDS.map((name, k) => [name, row[k]])]);
  const weakest = (pair) => (pair.matchI === null ? null : Math.min(pair.matchI, pair.matchJ));

  /* Three decimals with a sign; what rounds to nothing is 0.000 without one. */
  const change = (pair) => { const text = (pair.correlation - pair.twinCorrelation).toFixed(3); return Number(text) === 0 ? "0.000" : text.replace("-", "−"); };
  const HIDDEN = new Set(["together", "fires", "cosine", "match"]);  // on a narrow screen; the page of a pair has them
  const WHERE = {here: "here", twin: "the twin", both: "both"};
  /* What the reader should know about rows of large norm. */
  const rowsNote = (sae, run) => (sae.large ? `${number(sae.large)} of ${number(run.rows)} rows have more than 3 times the median norm; the number in brackets leaves them out, and ⚠ marks a pair whose correlation at least halves without them.`
    : "No row has more than 3 times the median norm" + (run.norm_limit ? ` (rows above ${number(run.norm_limit)} times were left out from the start)` : "") + ", so no pair rests on such rows.");

  page(/^\/(\d+)\/pairs$/, "Pairs", async (match, query) => {
    const index = Number(match[1]), run = unbraid.run(), sae = run.saes[index], all = (await load(`${index}/pairs`)).map(read);
    const twin = sae.twin === null ? null : run.saes[sae.twin];
    const without = sae.large ? " (without)" : "", calm = (value) => (sae.large ? ` (${number(value)})` : "");
    const columns = [["at", "pair", (p) => `${p.i} · ${p.j}`, (p) => p.at],
      ...(twin ? [["change", "change", change, (p) => Math.abs(p.correlation - p.twinCorrelation)], ["where", "where", (p) => WHERE[p.where], (p) => ["here", "both", "twin"].indexOf(p.where)]] : []),
      ["correlation", `correlation${without}`, (p) => number(p.correlation) + calm(p.calm) + (p.large ? " ⚠" : "")],
      ...(twin ? [["twinCorrelation", `in the twin${without}`, (p) => number(p.twinCorrelation) + calm(p.twinCalm)]] : []),
      ["together", "together", (p) => number(p.together)], ["fires", "each fires", (p) => `${number(p.firesI)} · ${number(p.firesJ)}`, (p) => Math.min(p.firesI, p.firesJ)],
      ["cosine", "decoder cos", (p) => number(p.cosine)], ...(twin ? [["match", "match", (p) => number(weakest(p)), weakest]] : [])];
    const state = {sort: query.get("sort") || "at", down: query.get("down") === "1", q: query.get("q") || ""};
    const head = h("tr", {}), body = h("tbody", {}), count = h("span", {class: "quiet", role: "status"});
    const search = h("input", {type: "search", placeholder: "feature number", "aria-label": "search pairs by feature number", value: state.q});
    function arrange() {
      const column = columns.find(([key]) => key === state.sort) || columns[0], value = column[3] || ((pair) => pair[column[0]]), wanted = state.q.trim();
      const shown = all.filter((pair) => !wanted || String(pair.i).startsWith(wanted) || String(pair.j).startsWith(wanted));
      shown.sort((a, b) => (state.down ? -1 : 1) * (value(a) - value(b)) || a.at - b.at);
      count.textContent = `${number(shown.length)} of ${number(all.length)} pairs`;
      head.replaceChildren(...columns.map(([key, name]) => h("th", {scope: "col", class: HIDDEN.has(key) ? "narrow-hidden" : null, "aria-sort": state.sort === key ? (state.down ? "descending" : "ascending") : null},
        h("button", {type: "button", onclick: () => { state.down = state.sort === key ? !state.down : key !== "at"; state.sort = key; arrange(); }}, name + (state.sort === key ? (state.down ? " ↓" : " ↑") : "")))));
      body.replaceChildren(...shown.map((pair) => h("tr", {}, columns.map(([key, , text]) => h("td", {class: HIDDEN.has(key) ? "narrow-hidden" : null}, key === "at" ? h("a", {href: `#/${index}/pair/${pair.at}`}, text(pair)) : text(pair))))));
      unbraid.keep(match[0], {sort: state.sort, down: state.down ? 1 : 0, q: state.q});
    }
    search.addEventListener("input", () => { state.q = search.value; arrange(); });
    arrange();
    return h("div", {}, h("h1", {}, `Entangled pairs of ${sae.name}`),
      h("p", {class: "quiet"}, `Correlation of codes on ${number(run.rows)} held-out tokens, among features that fire at least 10 times. `,
        twin ? `The pairs are the most correlated ones here and in the twin, ${twin.name} (the same SAE without decorrelation); those whose correlation changed most come first. `
          + "A feature's counterpart in the twin is the one with the nearest decoder row; “match” is the weaker of the two cosines, and pairs with a match below 0.5, which compare different features, come last; “where” says in which of the two a pair is among the most correlated. "
          : "This SAE has no twin without decorrelation to compare with; the most correlated pairs come first. ", rowsNote(sae, run)),
      h("div", {class: "bar"}, search, count), all.length ? h("div", {class: "scroll"}, h("table", {}, h("thead", {}, head), body)) : h("p", {}, "No two features fire often enough."));
  });

  page(/^\/(\d+)\/pair\/(\d+)$/, "Pairs", async (match) => {
    const index = Number(match[1]), at = Number(match[2]), run = unbraid.run(), sae = run.saes[index], size = run.chunk.pairs;
    if (at >= sae.pairs) throw new Error(`pair ${at} of ${sae.pairs}`);
    const [list, table, chunk] = await Promise.all([load(`${index}/pairs`), load(`${index}/features`), load(`${index}/pair-${Math.floor(at / size)}`)]);
    const pair = read(list[at], at), contexts = chunk[at % size], scales = [table.largest[pair.i], table.largest[pair.j]];
    await texts([...contexts.first, ...contexts.both, ...contexts.second]);
    const calm = (value) => (sae.large ? ` (${number(value)} without rows of large norm)` : "");
    const link = (feature, name, which) => h("a", {class: name, href: `#/${which}/feature/${feature}`}, `feature ${feature}`);
    const rows = [["correlation here", number(pair.correlation) + calm(pair.calm)], ["fire together on", `${number(pair.together)} tokens`],
      ["each fires on", `${number(pair.firesI)} and ${number(pair.firesJ)} tokens`], ["cosine of decoder rows", number(pair.cosine)]];
    if (pair.twinI !== null) rows.push([`correlation in ${run.saes[sae.twin].name}`, number(pair.twinCorrelation) + calm(pair.twinCalm)],
      ["counterparts there", h("span", {}, link(pair.twinI, "one", sae.twin), ` (cosine ${number(pair.matchI)}), `, link(pair.twinJ, "other", sae.twin), ` (cosine ${number(pair.matchJ)})`)]);
    if (pair.twinI !== null) rows.push(["among the most correlated of", pair.where === "both" ? "both" : pair.where === "twin" ? run.saes[sae.twin].name : sae.name]);
    const column = (title, name, items) => h("section", {class: "card"}, h("h2", {class: name}, title),
      items.length ? items.map((item) => context(item, scales)) : h("p", {class: "quiet"}, "none on these tokens"));
    const step = (to, rel, name) => (to < 0 || to >= sae.pairs ? null : h("a", {rel, href: `#/${index}/pair/${to}`}, name));
    return h("div", {}, h("p", {class: "steps"}, h("a", {href: `#/${index}/pairs`}, "all pairs"), step(at - 1, "prev", "← previous"), step(at + 1, "next", "next →")),
      h("h1", {}, "Pair of ", link(pair.i, "one", index), " and ", link(pair.j, "other", index)),
      h("div", {class: "card"}, h("table", {class: "facts"}, h("tbody", {}, rows.map(([name, value]) => h("tr", {}, h("th", {scope: "row", class: "text"}, name), h("td", {class: "text"}, value)))))),
      h("p", {class: pair.large ? "warning" : "quiet"}, !sae.large ? rowsNote(sae, run) : pair.large ? "⚠ This pair lives on a few rows of large norm (more than 3 times the median): without them its correlation at least halves." : "This pair does not rest on rows of large norm."),
      h("h2", {}, "Where they meet and where they part"),
      h("div", {class: "columns"}, column(`Only feature ${pair.i}`, "one", contexts.first), column("Both, on one token", "both", contexts.both), column(`Only feature ${pair.j}`, "other", contexts.second)));
  });
})();
