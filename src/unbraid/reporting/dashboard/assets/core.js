"use strict";
/* What every page uses: data that arrives as scripts, elements built without HTML strings, routes in the hash, keys.

Text from data sets reaches the document through textContent and nowhere else, so nothing in it is ever markup. */
const unbraid = (() => {
  const data = new Map(), waiting = new Map(), pages = [];
  let run = null, view = 0;

  /* Called by every data script. */
  function provide(key, value) {
    data.set(key, value);
    if (key === "run") { run = value; start(); }
  }

  /* The piece of data `key`, loaded from data/<key>.js when it is first asked for. */
  function load(key) {
    if (data.has(key)) return Promise.resolve(data.get(key));
    if (!waiting.has(key)) {
      waiting.set(key, new Promise((resolve, reject) => {
        const script = document.createElement("script");
        script.src = `data/${key}.js`;
        script.onload = () => { script.remove(); data.has(key) ? resolve(data.get(key)) : reject(new Error(`data/${key}.js is damaged`)); };
        script.onerror = () => { script.remove(); waiting.delete(key); reject(new Error(`data/${key}.js is missing`)); };
        document.head.append(script);
      }));
    }
    return waiting.get(key);
  }

  /* An element: h("a", {href: "#/", class: "x"}, "text", child). Strings become text nodes. */
  function h(name, attributes = {}, ...children) {
    const svg = ["svg", "path", "line", "text", "rect", "g", "circle", "title"].includes(name);
    const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (value === null || value === undefined || value === false) continue;
      if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
      else element.setAttribute(key, value === true ? "" : String(value));
    }
    element.append(...children.flat().filter((child) => child !== null && child !== undefined));
    return element;
  }

  function number(value, digits = 3) {
    if (value === null || value === undefined) return "–";
    if (value === 0) return "0";  // and no -0
    if (Number.isInteger(value)) return value.toLocaleString("en");
    const size = Math.abs(value);
    return size !== 0 && (size < 1e-3 || size >= 1e5) ? value.toExponential(digits - 1) : String(Number(value.toPrecision(digits)));
  }

  /* Characters that would be invisible, or turn the text around them, as visible names. */
  const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff\ufffd]/g;
  function visible(text) {
    const parts = [];
    let last = 0;
    const shown = text.replace(/\n/g, "↵").replace(/\t/g, "⇥");
    for (const match of shown.matchAll(HIDDEN)) {
      if (match.index > last) parts.push(shown.slice(last, match.index));
      const code = match[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
      parts.push(h("span", {class: "control"}, `⟨U+${code}⟩`));
      last = match.index + match[0].length;
    }
    if (last < shown.length) parts.push(shown.slice(last));
    return parts;
  }

  /* The tokens of a context lie in chunks that all SAEs share. */
  const chunkOf = (number) => Math.floor(number / run.text_chunks.size);
  async function texts(items) {
    await Promise.all([...new Set(items.map((item) => chunkOf(item.at[0])))].map((chunk) => load(`text-${chunk}`)));
  }

  /* A context with its tokens coloured by one or two features; `scales` are their largest codes. `texts` comes first.
  It shows the stretch around the peak, and the whole context on demand. */
  function context(item, scales) {
    const [number_, start, stop] = item.at, tokens = data.get(`text-${chunkOf(number_)}`)[number_ % run.text_chunks.size];
    const codes = item.fired.map(([positions, values]) => new Map(positions.map((position, k) => [position, values[k]])));
    const line = h("div", {class: "context", dir: "auto"}), words = h("span", {});
    const peaks = codes.map((known) => { let most = 0; for (const [at, code] of known) if (at >= start && at < stop) most = Math.max(most, code); return most; });
    let whole = false;
    function draw() {
      words.replaceChildren();
      for (let at = whole ? 0 : start; at < (whole ? tokens.length : stop); at++) {
        const here = codes.map((known) => known.get(at) || 0);
        const shares = here.map((code, which) => (scales[which] > 0 ? Math.min(1, code / scales[which]) : 0));
        const span = h("span", {class: "token"}, visible(tokens[at]));
        const fired = shares.map((share, which) => (share > 0 ? which : -1)).filter((which) => which >= 0);
        if (fired.length) {
          const colour = fired.length > 1 ? "--both" : fired[0] === 0 ? "--one" : "--other";
          span.style.background = `rgb(var(${colour}) / ${(0.12 + 0.6 * Math.max(...shares)).toFixed(3)})`;
          span.title = here.map((code) => number(code)).join(" · ");
          if (codes.length === 1 && here[0] === peaks[0]) span.classList.add("peak");
        }
        words.append(span);
      }
    }
    line.append(h("span", {class: "amount"}, peaks.map((peak) => number(peak)).join(" · ")), words);
    if (start > 0 || stop < tokens.length) {
      const button = h("button", {type: "button", class: "wider", "aria-expanded": "false", onclick: () => {
        whole = !whole;
        button.textContent = whole ? "less" : "more";
        button.setAttribute("aria-expanded", String(whole));
        draw();
      }}, "more");
      line.append(button);
    }
    draw();
    return line;
  }

  /* pages.push([pattern, tab, render(match, query)]); render returns an element or a promise of one. */
  function page(pattern, tab, render) { pages.push([pattern, tab, render]); }

  function route() {
    const [path, search] = (location.hash.slice(1) || "/").split("?");
    return {path, query: new URLSearchParams(search || "")};
  }

  /* Keeps how a page is sorted and searched in the address, unless the reader has left that page meanwhile. */
  function keep(path, state) {
    if (route().path === path) history.replaceState(null, "", `#${path}?${new URLSearchParams(state)}`);
  }

  async function show() {
    if (!run) return;
    const {path, query} = route(), mine = ++view;
    const main = document.getElementById("main");
    const found = pages.map(([pattern, tab, render]) => [path.match(pattern), tab, render]).find(([match]) => match);
    const number = Number((path.match(/^\/(\d+)/) || [0, document.getElementById("sae").value])[1]);
    let body;
    try {
      if (!found || !run.saes[number]) throw new Error(`there is no page ${path}`);
      body = await found[2](found[0], query);
    } catch (problem) {
      body = h("p", {class: "error", role: "alert"}, `This page cannot be shown: ${problem.message}`);
    }
    if (mine !== view) return;
    document.getElementById("sae").value = String(number);
    tabs(number, found ? found[1] : "");
    document.body.dataset.ready = path;
    main.replaceChildren(body);
    const wanted = main.querySelector("[autofocus]");
    if (wanted) wanted.focus(); else if (document.activeElement === document.body) main.focus({preventScroll: true});
    main.dispatchEvent(new Event("shown"));
  }

  function tabs(sae, current) {
    const links = [["Overview", "#/"], ["Features", `#/${sae}/features`], ["Pairs", `#/${sae}/pairs`], ["Lists", "#/lists"]];
    document.getElementById("tabs").replaceChildren(...links.map(([name, href]) =>
      h("a", {href, "aria-current": name === current ? "page" : null}, name)));
  }

  function remember(key, value) { try { localStorage.setItem(key, value); } catch { /* a file page may have no storage */ } }
  function recall(key) { try { return localStorage.getItem(key); } catch { return null; } }

  function theme(name) {
    document.documentElement.dataset.theme = name;
    remember("unbraid-theme", name);
  }

  // A key pressed while a page is still on its way belongs to that page.
  function whenShown(act) {
    if (document.body.dataset.ready === route().path) act();
    else document.getElementById("main").addEventListener("shown", act, {once: true});
  }

  function keys(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
    if (event.key === "Escape" && typing) { event.target.blur(); return; }
    if (typing) return;
    const sae = document.getElementById("sae").value;
    const go = {o: "#/", f: `#/${sae}/features`, p: `#/${sae}/pairs`, l: "#/lists"}[event.key];
    const link = {j: "a[rel=next]", k: "a[rel=prev]"}[event.key];
    if (go) location.hash = go;
    else if (link) whenShown(() => { const found = document.querySelector(link); if (found) found.click(); });
    else if (event.key === "t") document.getElementById("theme").click();
    else if (event.key === "/") { const box = document.querySelector("input[type=search]"); if (box) box.focus(); }
    else return;
    event.preventDefault();
  }

  /* The secret of a served dashboard comes in the fragment and leaves the address bar at once; a reload keeps it. */
  function takeSecret() {
    const found = location.hash.match(/^#k=([\w-]+)$/);
    if (found) { history.replaceState(null, "", location.pathname); try { sessionStorage.setItem("unbraid-k", found[1]); } catch { /* kept by this page alone */ } }
    let kept = null;
    try { kept = sessionStorage.getItem("unbraid-k"); } catch { /* a file page may have no storage */ }
    return location.protocol === "http:" ? (found ? found[1] : kept) : null;
  }

  function start() {
    const dark = window.matchMedia("(prefers-color-scheme: dark)").matches;
    theme(recall("unbraid-theme") || (dark ? "dark" : "light"));
    document.title = `unbraid: ${run.name}`;
    const picker = document.getElementById("sae");
    picker.replaceChildren(...run.saes.map((sae, index) => h("option", {value: index}, sae.name)));
    picker.addEventListener("change", () => {
      const path = route().path.match(/^\/\d+\/(features|pairs)/);
      location.hash = `#/${picker.value}/${path ? path[1] : "features"}`;
    });
    document.getElementById("theme").addEventListener("click", () =>
      theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
    document.addEventListener("keydown", keys);
    window.addEventListener("hashchange", show);
    const secret = takeSecret();
    unbraid.labels.open(secret).then(show);
  }

  return {provide, load, h, number, visible, context, texts, page, route, keep, show, run: () => run};
})();
