"use strict";
/* The live page: asks the server, shows what comes. Text from models and data reaches the document through textContent
and nowhere else. The secret comes with the address, in its fragment, and leaves the address bar at once. */
(() => {
  const {h, number, visible} = unbraid;
  const byId = (id) => document.getElementById(id);
  const given = new URLSearchParams(location.hash.slice(1)), secret = given.get("k") || "";
  history.replaceState(null, "", location.pathname);
  const steering = new Map();  // address -> {by, without: Set}
  let reading = null, chosen = -1, running = null;

  function problem(text) {
    byId("problem").textContent = text;
    byId("problem").hidden = !text;
  }

  async function ask(path, body, signal) {
    const answer = await fetch(`/api/${path}`, {
      method: "POST", signal, cache: "no-store",
      headers: {"Content-Type": "application/json", "Authorization": `Bearer ${secret}`},
      body: JSON.stringify(body),
    });
    if (!answer.ok) {
      const said = await answer.text();
      let text = said;
      try { text = JSON.parse(said).error; } catch { /* plain text */ }
      throw new Error(text || `the server answered ${answer.status}`);
    }
    return answer;
  }

  async function asked(path, body) {
    problem("");
    try { return await (await ask(path, body)).json(); } catch (error) { problem(error.message); return null; }
  }

  /* The index of an address, which is what tells features of a dictionary apart; the whole address is its tooltip. */
  const index = (address) => h("span", {title: address}, address.slice(address.lastIndexOf("/") + 1));
  const here = (feature) => feature.feature.startsWith(`${byId("sae").value}/`);
  const bar = (share, kind = "") => {
    const element = h("span", {class: `measure ${kind}`});
    element.style.width = `${Math.round(140 * Math.max(0, Math.min(1, share)))}px`;
    return element;
  };

  function showTokens() {
    const strongest = reading.tokens.map((token) => Math.max(0, ...token.features.filter(here).map((one) => one.code)));
    const top = Math.max(...strongest, 1e-9);
    byId("tokens").replaceChildren(...reading.tokens.map((token, at) => {
      const button = h("button", {type: "button", class: "token", "aria-pressed": String(at === chosen), onclick: () => choose(at)}, visible(token.text));
      if (strongest[at] > 0) button.style.background = `rgb(var(--one) / ${(0.1 + 0.6 * strongest[at] / top).toFixed(3)})`;
      return button;
    }));
  }

  function choose(at) {
    chosen = at;
    const focused = document.activeElement && document.activeElement.classList.contains("token");
    showTokens();
    if (focused) byId("tokens").children[at].focus();
    const token = reading.tokens[at];
    byId("ranked").replaceChildren("Features at ", ...visible(token.text));
    const rows = token.features.filter(here).map((one) => h("tr", {},
      h("td", {class: "text"}, index(one.feature)), h("td", {}, number(one.code)),
      h("td", {}, one.share === null ? "" : `${Math.round(100 * one.share)} %`), h("td", {class: "text"}, visible(one.words)),
      h("td", {}, h("button", {type: "button", onclick: () => add(one.feature)}, "Steer"))));
    const error = token.error[byId("sae").value];
    byId("features").replaceChildren(rows.length
      ? h("table", {}, h("tr", {}, h("th", {}, "feature"), h("th", {}, "code"), h("th", {}, "of max"), h("th", {class: "text"}, "raises"), h("th")), rows)
      : h("p", {class: "quiet"}, token.read ? "no feature fires here" : "not read: a special token or the first"),
      h("p", {class: "quiet"}, token.read && error !== undefined ? `error ${number(error)}` : ""));
  }

  async function read() {
    byId("tokens").classList.add("asked");
    const found = await asked("read", {prompt: byId("prompt").value});
    byId("tokens").classList.remove("asked");
    if (!found) return;
    reading = found;
    chosen = -1;
    choose(reading.tokens.length - 1);
  }

  async function add(address) {
    const found = await asked("feature", {feature: address});
    if (!found || steering.has(found.feature)) return;
    steering.set(found.feature, {by: 0, without: new Set(), words: found.words, partners: found.partners, counterpart: found.counterpart});
    showSliders();
    showPartners([]);
  }

  function showSliders() {
    byId("sliders").replaceChildren(...[...steering].map(([address, one]) => {
      const amount = h("output", {}, number(one.by));
      const range = h("input", {type: "range", min: -3, max: 3, step: 0.1, value: one.by, "aria-label": `by how much to steer ${address}`,
        oninput: () => { one.by = Number(range.value); amount.textContent = number(one.by); }, onchange: generate});
      return h("div", {class: "slider"}, h("span", {title: address}, index(address), " ", h("span", {class: "quiet"}, visible(one.words))), range, amount,
        h("button", {type: "button", "aria-label": `stop steering ${address}`, onclick: () => { steering.delete(address); showSliders(); showPartners([]); }}, "×"));
    }));
  }

  function showPartners(rows) {
    const moved = new Map(rows.map((row) => [`${row.feature} ${row.partner}`, row]));
    const lines = [];
    for (const [address, one] of steering) {
      for (const pair of one.partners) {
        const row = moved.get(`${address} ${pair.partner}`) || {};
        const box = h("input", {type: "checkbox", "aria-label": `steer ${address} without ${pair.partner}`,
          onchange: () => { box.checked ? one.without.add(pair.partner) : one.without.delete(pair.partner); generate(); }});
        box.checked = one.without.has(pair.partner);
        lines.push(h("tr", {}, h("td", {class: "text"}, index(pair.partner)), h("td", {}, number(pair.correlation)), h("td", {}, number(pair.cosine)),
          h("td", {}, `${number(row.before)} → ${number(row.after)}`), h("td", {}, box),
          h("td", {}, pair["twin partner"] ? `${number(row["twin before"])} → ${number(row["twin after"])}` : "–"), h("td", {class: "text"}, visible(pair.words))));
      }
    }
    byId("partners").replaceChildren(lines.length ? h("table", {}, h("tr", {}, h("th", {}, "partner"), h("th", {}, "r"), h("th", {}, "cosine"), h("th", {}, "code"),
      h("th", {}, "without"), h("th", {}, "in the twin"), h("th", {class: "text"}, "raises")), lines) : h("p", {class: "quiet"}, "steer a feature to see its partners"));
  }

  function showNext(rows, kl) {
    const line = (row) => h("tr", {}, h("td", {class: "text"}, visible(row.token)),
      h("td", {class: "text"}, bar(row.plain, "plain"), ` ${number(row.plain, 2)}`), h("td", {class: "text"}, bar(row.steered), ` ${number(row.steered, 2)}`));
    byId("next").replaceChildren(h("table", {}, h("tr", {}, h("th", {class: "text"}, "token"), h("th", {class: "text"}, "plain"), h("th", {class: "text"}, "steered")), rows.map(line)),
      h("p", {class: "quiet"}, `KL ${number(kl)} per prompt token`));
  }

  function take(piece) {
    if (piece.kind === "next") showNext(piece.rows, piece.kl);
    else if (piece.kind === "plain" || piece.kind === "steered") byId(piece.kind).append(...visible(piece.text));
    else if (piece.kind === "effect") { showPartners(piece.partners); byId("python").textContent = piece.python; }
    else if (piece.kind === "error") problem(piece.text);
    else byId("state").textContent = piece.kind;
  }

  async function generate() {
    if (running) running.abort();
    const mine = running = new AbortController();
    problem("");
    byId("plain").replaceChildren(); byId("steered").replaceChildren();
    byId("cancel").disabled = false;
    byId("state").textContent = "running";
    const edits = [...steering].map(([feature, one]) => ({feature, by: one.by, without: [...one.without]}));
    try {
      const answer = await ask("steer", {prompt: byId("prompt").value, edits, tokens: Number(byId("count").value),
        temperature: Number(byId("temperature").value), seed: Math.trunc(Number(byId("seed").value))}, mine.signal);
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      let rest = "";
      for (;;) {
        const {done, value} = await reader.read();
        if (done) break;
        const lines = (rest + value).split("\n");
        rest = lines.pop();
        if (mine !== running) return;
        for (const line of lines) take(JSON.parse(line));
      }
    } catch (error) {
      if (mine !== running) return;
      if (error.name === "AbortError") byId("state").textContent = "cancelled";
      else { byId("state").textContent = ""; problem(error.message); }
    }
    byId("cancel").disabled = true;
    running = null;
  }

  async function attribute() {
    const found = await asked("attribute", {prompt: byId("prompt").value, metric: byId("metric").value, method: byId("method").value, sae: byId("sae").value});
    if (!found) return;
    const largest = Math.max(...found.contributions.map((row) => Math.abs(row.contribution)), 1e-9);
    const [site] = Object.values(found.sites);
    const sum = (values) => values.reduce((a, b) => a + b, 0);
    byId("contributions").replaceChildren(
      h("p", {}, ...visible(found.described), ` = ${number(found.metric)}; features ${number(site.features)}, error ${number(sum(site.error))}, bias ${number(site.bias)}; `,
        h("strong", {}, `gap ${site.gap === null ? "without bound" : `${number(100 * site.gap)} %`}`)),
      h("table", {}, found.contributions.map((row) => h("tr", {}, h("td", {class: "text"}, index(row.feature)), h("td", {class: "text"}, ...visible(row.token || "")),
        h("td", {class: "text"}, bar(Math.abs(row.contribution) / largest, row.contribution < 0 ? "minus" : ""), ` ${number(row.contribution)}`), h("td", {class: "text"}, visible(row.words))))));
    byId("python").textContent = found.python;
  }

  async function copy() {
    try { await navigator.clipboard.writeText(byId("python").textContent); byId("state").textContent = "copied"; }
    catch { getSelection().selectAllChildren(byId("python")); }
  }

  function theme(name) {
    document.documentElement.dataset.theme = name;
    try { localStorage.setItem("unbraid-theme", name); } catch { /* storage may be off */ }
  }

  async function start() {
    let kept = null;
    try { kept = localStorage.getItem("unbraid-theme"); } catch { /* storage may be off */ }
    theme(kept || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
    const on = (id, event, act) => byId(id).addEventListener(event, (happened) => { happened.preventDefault(); act(); });
    on("theme", "click", () => theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
    on("ask", "submit", read);
    on("add", "submit", () => add(byId("address").value.trim()));
    on("attribute", "submit", attribute);
    on("steer", "click", generate);
    on("cancel", "click", () => { if (running) running.abort(); });
    on("copy", "click", copy);
    on("sae", "change", () => { if (reading) choose(chosen); });
    showPartners([]);
    const about = await asked("about", {});
    if (!about) return;
    byId("run").textContent = `${about.run} · ${about.model}`;
    byId("sae").replaceChildren(...about.dictionaries.map((one) => h("option", {value: one.name}, one.name)));
    await read();
    const wanted = given.get("feature");  // a dashboard links to a feature
    if (wanted) {
      if (about.dictionaries.some((one) => wanted.startsWith(`${one.name}/`))) byId("sae").value = wanted.slice(0, wanted.lastIndexOf("/"));
      byId("address").value = wanted;
      await add(wanted);
    }
  }

  start();
})();
