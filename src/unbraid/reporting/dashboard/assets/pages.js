"use strict";
/* Overview, feature table and feature page. */
(() => {
  const {h, number, load, page, context, texts, visible, charts, labels} = unbraid;
  const METRICS = [["r2", "R²"], ["l0", "L0"], ["correlation_mean", "mean corr."], ["correlation_top", "top corr."],
    ["correlation_reduction", "reduction"], ["dead_fraction", "dead"], ["updates_per_second", "updates/s"]];

  page(/^\/$/, "Overview", () => {
    const run = unbraid.run(), looks = charts.looks(run.saes), hidden = new Set();
    const panels = h("div", {class: "charts"});
    function draw() {
      const {step, curves} = run.figure;
      const lines = (key) => run.saes.map((sae, i) => ({name: sae.name, values: curves[key][sae.name], ...looks[i]})).filter((line) => !hidden.has(line.name));
      const spread = lines("correlation_mean").map((line) => {
        const sd = curves.correlation_std[line.name], edge = (sign) => line.values.map((v, i) => (v === null ? null : v + sign * sd[i]));
        return {...line, low: edge(-1), high: edge(1)};
      });
      panels.replaceChildren(charts.chart("Adaptive threshold τ", "correlation", step, lines("tau")), charts.chart("Correlation of pairs: mean ± 1 sd", "correlation", step, spread),
        charts.chart("Successful updates, cumulative", "updates", step, lines("updates"), true), charts.chart("Loss", "loss", step, lines("loss")));
    }
    const legend = h("div", {class: "legend", role: "group", "aria-label": "SAEs drawn"}, run.saes.map((sae, i) => {
      const swatch = h("svg", {viewBox: "0 0 34 10", "aria-hidden": "true"},
        h("line", {x1: 0, x2: 34, y1: 5, y2: 5, stroke: looks[i].colour, "stroke-width": 2.4, "stroke-dasharray": looks[i].dash}));
      const button = h("button", {type: "button", "aria-pressed": "true", onclick: () => {
        hidden.has(sae.name) ? hidden.delete(sae.name) : hidden.add(sae.name);
        button.setAttribute("aria-pressed", String(!hidden.has(sae.name)));
        draw();
      }}, swatch, sae.name);
      return button;
    }));
    if (run.figure) draw();
    const shown = METRICS.filter(([key]) => run.saes.some((sae) => sae.metrics[key] !== undefined && sae.metrics[key] !== null));
    const table = h("table", {}, h("thead", {}, h("tr", {}, ["SAE", "features", ...shown.map(([, name]) => name), "look at"].map((name) => h("th", {scope: "col"}, name)))),
      h("tbody", {}, run.saes.map((sae, i) => h("tr", {}, h("td", {}, sae.name), h("td", {}, number(sae.features)),
        shown.map(([key]) => h("td", {}, number(sae.metrics[key]))),
        h("td", {}, h("a", {href: `#/${i}/features`}, "features"), " · ", h("a", {href: `#/${i}/pairs`}, `${sae.pairs} pairs`))))));
    return h("div", {}, h("h1", {}, run.name),
      h("p", {class: "quiet"}, `${run.model}, text ${run.text}` + (run.steps ? `; ${number(run.steps.executed)} of ${number(run.steps.planned)} steps. ` : ". ")
        + `Features and pairs below are read on ${number(run.rows)} held-out tokens in ${number(run.contexts)} contexts. `
        + (run.of_a_run ? `Top correlation: the ${number(run.fraction * 100)} % most correlated pairs.` : "")),
      h("div", {class: "scroll"}, table), run.figure ? [h("h2", {}, "Training"), legend, panels] : null);
  });

  /* The feature table draws only the rows in view, so its length costs nothing. */
  const ROW = 30;
  const COLUMNS = [["id", "feature", "88px"], ["fires", "density", "100px"], ["largest", "largest", "92px"], ["mean", "mean", "92px"],
    ["partner", "top corr.", "116px"], ["neighbour", "decoder cos", "128px"], ["label", "label", "140px"], ["peaks", "fires on", "1fr"], ["raises", "raises", "1fr"]];
  const TEXTS = ["label", "peaks", "raises"], NARROW = {id: "72px", partner: "98px", label: "minmax(0, 1fr)", peaks: "minmax(0, 2fr)"};
  const classes = (key) => [TEXTS.includes(key) ? "text" : "", key in NARROW ? "" : "narrow-hidden"].join(" ").trim() || null;
  page(/^\/(\d+)\/features$/, "Features", async (match, query) => {
    const index = Number(match[1]), run = unbraid.run(), sae = run.saes[index], loaded = await load(`${index}/features`);
    const address = (i) => `${sae.name}/${i}`, notes = loaded.peaks.map((_, i) => labels.of(address(i)));
    const table = {...loaded, label: notes.map(({label}) => label)};
    const words = table.peaks.map((text, i) => `${i} ${text} ${table.raises[i]} ${notes[i].label} ${notes[i].note}`.toLowerCase());
    let contexts = null, found = new Set();
    const state = {sort: query.get("sort") || "partner", down: query.get("down") !== "0", q: query.get("q") || "", alive: query.get("alive") !== "0"};
    let order = [], selected = 0;
    const rows = h("div", {class: "rows", tabindex: "0", role: "grid", "aria-label": "features; arrow keys move, Enter opens"}), space = h("div", {}), count = h("span", {class: "quiet", role: "status"});
    const search = h("input", {type: "search", placeholder: "number, token, label, text of a context …", "aria-label": "search features", value: state.q});
    const alive = h("input", {type: "checkbox", id: "alive"});
    alive.checked = state.alive;
    const head = h("div", {class: "head", role: "row"});
    for (const element of [head, rows]) {
      element.style.setProperty("--columns", COLUMNS.map(([, , wide]) => wide).join(" "));
      element.style.setProperty("--narrow", COLUMNS.filter(([key]) => key in NARROW).map(([key]) => NARROW[key]).join(" "));
    }
    rows.append(space);

    function arrange() {
      const wanted = state.q.trim().toLowerCase(), values = state.sort === "id" ? null : table[state.sort];
      order = [];
      for (let i = 0; i < words.length; i++) if ((!state.alive || table.fires[i] > 0) && (!wanted || words[i].includes(wanted) || found.has(i))) order.push(i);
      const sign = state.down ? -1 : 1;
      if (!values) { if (state.down) order.reverse(); }
      else if (typeof values[0] === "string") order.sort((a, b) => sign * values[a].localeCompare(values[b]) || a - b);
      else order.sort((a, b) => sign * (values[a] - values[b]) || a - b);
      count.textContent = `${number(order.length)} of ${number(words.length)} features`;
      space.style.height = `${order.length * ROW}px`;
      selected = 0;
      rows.scrollTop = 0;
      headings();
      draw();
      unbraid.keep(match[0], {sort: state.sort, down: state.down ? 1 : 0, q: state.q, alive: state.alive ? 1 : 0});
      unbraid.order = {index, list: order};
    }
    function headings() {
      head.replaceChildren(...COLUMNS.map(([key, name]) => h("button", {type: "button", role: "columnheader", class: classes(key),
        "aria-sort": state.sort === key ? (state.down ? "descending" : "ascending") : null,
        onclick: () => { state.down = state.sort === key ? !state.down : true; state.sort = key; arrange(); }},
      name + (state.sort === key ? (state.down ? " ↓" : " ↑") : ""))));
    }
    function draw() {
      const from = Math.max(0, Math.floor(rows.scrollTop / ROW) - 6), to = Math.min(order.length, from + Math.ceil((rows.clientHeight || 700) / ROW) + 12);
      const drawn = [];
      for (let at = from; at < to; at++) {
        const i = order[at];
        const row = h("a", {class: at === selected ? "row selected" : "row", role: "row", tabindex: "-1", href: `#/${index}/feature/${i}`, "data-at": at},
          COLUMNS.map(([key]) => (TEXTS.includes(key) ? h("span", {class: classes(key), dir: "auto"}, visible(table[key][i]))
            : h("span", {class: classes(key)}, key === "id" ? String(i) : number(key === "fires" ? table.fires[i] / run.rows : table[key][i])))));
        row.style.top = `${at * ROW}px`;
        drawn.push(row);
      }
      rows.replaceChildren(space, ...drawn);
    }
    rows.addEventListener("scroll", draw, {passive: true});
    rows.addEventListener("keydown", (event) => {
      const far = Math.max(1, Math.floor(rows.clientHeight / ROW) - 1);
      const moves = {ArrowDown: 1, ArrowUp: -1, PageDown: far, PageUp: -far, Home: -order.length, End: order.length};
      if (event.key === "Enter" && order.length) location.hash = `#/${index}/feature/${order[selected]}`;
      else if (event.key in moves) {
        selected = Math.max(0, Math.min(order.length - 1, selected + moves[event.key]));
        if (selected * ROW < rows.scrollTop) rows.scrollTop = selected * ROW;
        else if ((selected + 1) * ROW > rows.scrollTop + rows.clientHeight) rows.scrollTop = (selected + 1) * ROW - rows.clientHeight;
        draw();
      } else return;
      event.preventDefault();
    });
    /* Which features have the words in a context that their page shows; the texts are loaded when first asked for. */
    async function lookIntoContexts() {
      const wanted = state.q.trim().toLowerCase();
      if (wanted.length < 2) { found = new Set(); return; }
      contexts = contexts || unbraid.searchable(index);
      const within = await contexts;
      if (rows.isConnected && wanted === state.q.trim().toLowerCase()) { found = within(wanted); arrange(); }
    }
    search.addEventListener("input", () => { state.q = search.value; found = new Set(); arrange(); lookIntoContexts(); });
    search.addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === "ArrowDown") { rows.focus(); event.preventDefault(); } });
    alive.addEventListener("change", () => { state.alive = alive.checked; arrange(); });
    document.getElementById("main").addEventListener("shown", draw, {once: true});
    if (state.q.trim().length > 1) found = (await (contexts = unbraid.searchable(index)))(state.q.trim().toLowerCase());
    arrange();
    const tools = unbraid.selection(`${run.name} ${sae.name}`, () => order.map(address));
    return h("div", {}, h("h1", {}, `Features of ${sae.name}`),
      h("div", {class: "bar"}, search, h("label", {for: "alive"}, alive, " only those that fire"), count), h("div", {class: "table", tabindex: "-1"}, head, rows), tools);
  });

  /* A function from words to the features of SAE `index` whose excerpts hold them, in whole contexts read once. */
  unbraid.searchable = async (index) => {
    const run = unbraid.run(), {size, contexts} = run.text_chunks, chunks = Math.ceil(contexts / size);
    const [where, ...loaded] = await Promise.all([load(`${index}/where`), ...Array.from({length: chunks}, (_, at) => load(`text-${at}`))]);
    const lines = loaded.flat().map((tokens) => {
      let end = 0;
      const ends = tokens.map((token) => (end += token.toLowerCase().length));
      return {text: tokens.map((token) => token.toLowerCase()).join(""), ends};
    });
    return (wanted) => {
      const places = lines.map(({text, ends}) => {
        const hits = [];
        for (let at = text.indexOf(wanted); at >= 0; at = text.indexOf(wanted, at + 1))
          hits.push([ends.findIndex((end) => end > at), ends.findIndex((end) => end >= at + wanted.length)]);
        return hits;
      });
      return new Set(where.flatMap((items, feature) =>
        (items.some(([context, start, stop]) => places[context].some(([first, last]) => first >= start && last < stop)) ? [feature] : [])));
    };
  };

  function tokens(title, list, name) {
    return h("section", {class: "card"}, h("h2", {}, title), list.length
      ? h("table", {}, h("tbody", {}, list.map(([token, value]) => h("tr", {}, h("td", {class: "text", dir: "auto"}, visible(token)), h("td", {}, number(value))))))
      : h("p", {class: "quiet"}, name));
  }
  function others(title, index, list, link) {
    return h("section", {class: "card"}, h("h2", {}, title), list.length
      ? h("table", {}, h("tbody", {}, list.map(([feature, value]) => h("tr", {}, h("td", {}, h("a", {href: link(feature)}, `feature ${feature}`)), h("td", {}, number(value))))))
      : h("p", {class: "quiet"}, "none on these tokens"));
  }

  /* The strongest contexts, then some of each quarter of the others, under headings that say which. */
  const QUARTERS = ["Upper quarter", "Second quarter", "Third quarter", "Lowest quarter"];
  function banded(data, largest) {
    const others = data.quarters.reduce((sum, [contexts]) => sum + contexts, 0);
    const draw = (items) => items.map((item) => context(item, [largest]));
    return [h("h3", {}, `The strongest ${data.contexts.length} of ${number(data.contexts.length + others)} contexts`), ...draw(data.contexts),
      ...data.quarters.flatMap(([contexts, low, high, items], at) => [h("h3", {}, `${QUARTERS[at]} of the other ${number(others)}: `
        + `largest code ${number(low)} to ${number(high)}` + (contexts > items.length ? `, ${items.length} of ${number(contexts)} shown` : "")), ...draw(items)])];
  }

  page(/^\/(\d+)\/feature\/(\d+)$/, "Features", async (match) => {
    const index = Number(match[1]), feature = Number(match[2]), run = unbraid.run(), sae = run.saes[index];
    if (feature >= sae.features) throw new Error(`feature ${feature} of ${sae.features}`);
    const size = run.chunk.features, [table, chunk] = await Promise.all([load(`${index}/features`), load(`${index}/feature-${Math.floor(feature / size)}`)]);
    const data = chunk[feature % size], largest = table.largest[feature], address = `${sae.name}/${feature}`;
    await texts([...data.contexts, ...data.quarters.flatMap(([, , , items]) => items)]);
    const twin = sae.twin !== null && table.counterpart ? h("p", {}, `Counterpart in ${run.saes[sae.twin].name}: `,
      h("a", {href: `#/${sae.twin}/feature/${table.counterpart[feature]}`}, `feature ${table.counterpart[feature]}`), ` (cosine of decoder rows ${number(table.match[feature])})`) : null;
    const list = unbraid.order && unbraid.order.index === index && unbraid.order.list.includes(feature) ? unbraid.order.list : null;
    const at = list ? list.indexOf(feature) : feature, of = (place) => (list ? list[place] : place >= 0 && place < sae.features ? place : undefined);
    const step = (place, rel, name) => (of(place) === undefined ? null : h("a", {rel, href: `#/${index}/feature/${of(place)}`}, name));
    return h("div", {},
      h("p", {class: "steps"}, h("a", {href: `#/${index}/features`}, "all features"), step(at - 1, "prev", "← previous"), step(at + 1, "next", "next →")),
      h("h1", {}, `Feature ${feature} of ${sae.name}`),
      h("p", {class: "quiet"}, `fires on ${number(table.fires[feature])} of ${number(run.rows)} tokens (${number(100 * table.fires[feature] / run.rows)} %), largest code ${number(largest)}, mean where it fires ${number(table.mean[feature])}`),
      twin, unbraid.tryIt(address), labels.editor(address),
      h("div", {class: "columns small"},
        h("section", {class: "card"}, h("h2", {}, "How strongly it fires"), data.histogram.length ? charts.bars(data.histogram, largest) : h("p", {class: "quiet"}, "silent on these tokens")),
        tokens("Tokens it raises", data.raised, "no unembedding"), tokens("Tokens it lowers", data.lowered, "no unembedding"),
        others("Most correlated codes", index, data.partners, (other) => `#/${index}/feature/${other}`),
        others("Nearest decoder rows", index, data.neighbours, (other) => `#/${index}/feature/${other}`)),
      h("h2", {}, "Where it fires"), h("section", {class: "card"}, data.contexts.length ? banded(data, largest) : h("p", {class: "quiet"}, "nowhere on these tokens")));
  });
})();
