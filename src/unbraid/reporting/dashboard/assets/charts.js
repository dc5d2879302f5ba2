"use strict";
/* Small SVG charts: lines with a readout that follows the pointer or the arrow keys, and bars. */
unbraid.charts = (() => {
  const {h, number} = unbraid;
  const COLOURS = ["#4063d8", "#d1495b", "#c98a00", "#2f9e6e", "#8a8f98", "#3fa7d6"], DASHES = ["", "6 4", "2 3", "8 3 2 3"];
  const WIDE = 520, HIGH = 250, LEFT = 66, RIGHT = 10, TOP = 10, BOTTOM = 42;

  /* Site gives the colour, variant the dashes, as in the printed figure. */
  function looks(saes) {
    const sites = [...new Set(saes.map((sae) => sae.site))], variants = [...new Set(saes.map((sae) => sae.variant))];
    return saes.map((sae) => ({
      colour: COLOURS[sites.indexOf(sae.site) % COLOURS.length],
      dash: DASHES[variants.indexOf(sae.variant) % DASHES.length],
    }));
  }

  function ticks(low, high, count = 5) {
    const raw = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((m) => m * power).find((size) => size >= raw);
    const found = [];
    for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-9; at += step) found.push(Number(at.toPrecision(12)));
    return found;
  }

  function logTicks(low, high) {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
      for (const m of [1, 2, 5]) { const at = m * 10 ** power; if (at >= low && at <= high) found.push(Number(at.toPrecision(12))); }
    return found.length > 1 ? found : ticks(low, high);
  }

  /* lines: [{name, values, colour, dash, low?, high?}] over the shared xs; `axis` names the other axis. Counts are
  never drawn on a logarithmic axis. */
  function chart(title, axis, xs, lines, counts = false) {
    const all = lines.flatMap((line) => [...line.values, ...(line.low || []), ...(line.high || [])]).filter((v) => v !== null);
    const card = h("figure", {class: "card chart"}, h("h2", {}, title));
    if (!all.length) { card.append(h("p", {class: "quiet"}, "not measured in this run")); return card; }
    let low = Math.min(...all), high = Math.max(...all);
    const log = !counts && low > 0 && high / low > 4;
    if (!log) { low = Math.min(low, 0); high = high === low ? low + 1 : high; }
    const last = Math.max(...xs, 1), scale = log ? Math.log : (v) => v;
    const x = (v) => LEFT + (v / last) * (WIDE - LEFT - RIGHT);
    const y = (v) => HIGH - BOTTOM - ((scale(v) - scale(low)) / (scale(high) - scale(low) || 1)) * (HIGH - TOP - BOTTOM);
    const svg = h("svg", {viewBox: `0 0 ${WIDE} ${HIGH}`, role: "img", tabindex: "0", "aria-label": `${title}; arrow keys read values`});
    for (const tick of log ? logTicks(low, high) : ticks(low, high)) {
      svg.append(h("line", {class: "grid", x1: LEFT, x2: WIDE - RIGHT, y1: y(tick), y2: y(tick)}));
      svg.append(h("text", {x: LEFT - 6, y: y(tick) + 4, "text-anchor": "end"}, number(tick)));
    }
    for (const tick of ticks(0, last)) svg.append(h("text", {x: x(tick), y: HIGH - 26, "text-anchor": "middle"}, number(tick)));
    svg.append(h("text", {x: (LEFT + WIDE) / 2, y: HIGH - 8, "text-anchor": "middle"}, "training step"),
      h("text", {transform: `translate(13 ${(TOP + HIGH - BOTTOM) / 2}) rotate(-90)`, "text-anchor": "middle"}, log ? `${axis} (log scale)` : axis));
    svg.append(h("line", {class: "axis", x1: LEFT, x2: WIDE - RIGHT, y1: HIGH - BOTTOM, y2: HIGH - BOTTOM}));
    const trace = (values) => values.map((v, i) => (v === null ? "" : `${i && values[i - 1] !== null ? "L" : "M"}${x(xs[i]).toFixed(1)} ${y(v).toFixed(1)}`)).join("");
    for (const line of lines.filter(({low}) => low)) {
      const known = xs.map((_, i) => i).filter((i) => line.low[i] !== null);
      const up = known.map((i) => `${x(xs[i]).toFixed(1)} ${y(line.high[i]).toFixed(1)}`);
      const down = known.reverse().map((i) => `${x(xs[i]).toFixed(1)} ${y(line.low[i]).toFixed(1)}`);
      if (up.length) svg.append(h("path", {d: `M${up.join("L")}L${down.join("L")}Z`, fill: line.colour, opacity: Math.max(0.04, 0.15 / lines.length)}));
    }
    for (const line of lines) {
      svg.append(h("path", {d: trace(line.values), fill: "none", stroke: line.colour, "stroke-width": 1.8, "stroke-dasharray": line.dash}));
    }
    const cursor = h("line", {class: "axis", y1: TOP, y2: HIGH - BOTTOM, visibility: "hidden"});
    const readout = h("div", {class: "readout", "aria-live": "polite"});
    let at = xs.length - 1;
    function read(index) {
      at = Math.max(0, Math.min(xs.length - 1, index));
      cursor.setAttribute("x1", x(xs[at]));
      cursor.setAttribute("x2", x(xs[at]));
      cursor.setAttribute("visibility", "visible");
      readout.replaceChildren(h("span", {}, `step ${number(xs[at])}`), ...lines.map((line) => {
        const span = h("span", {}, `${line.name} ${number(line.values[at])}`);
        span.style.color = line.colour;
        return span;
      }));
    }
    svg.append(cursor);
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect(), step = ((event.clientX - box.left) / box.width * WIDE - LEFT) / (WIDE - LEFT - RIGHT) * last;
      read(xs.reduce((best, v, i) => (Math.abs(v - step) < Math.abs(xs[best] - step) ? i : best), 0));
    });
    svg.addEventListener("keydown", (event) => {
      const move = {ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10}[event.key];
      if (move) { read(at + move); event.preventDefault(); }
    });
    card.append(svg, readout);
    return card;
  }

  function bars(counts, largest) {
    const svg = h("svg", {viewBox: "0 0 300 120", role: "img", "aria-label": "how often each strength of this feature occurs"});
    const top = Math.max(...counts, 1), wide = 290 / counts.length;
    counts.forEach((count, bin) => {
      const tall = count ? Math.max(1, (count / top) * 78) : 0;
      const bar = h("rect", {x: 5 + bin * wide, y: 96 - tall, width: wide - 1, height: tall, fill: "rgb(var(--one))"},
        h("title", {}, `${number(largest * bin / counts.length)} to ${number(largest * (bin + 1) / counts.length)}: ${number(count)} tokens`));
      svg.append(bar);
    });
    svg.append(h("line", {class: "axis", x1: 5, x2: 295, y1: 96, y2: 96}), h("text", {x: 5, y: 112}, "0"),
      h("text", {x: 295, y: 112, "text-anchor": "end"}, number(largest)), h("text", {x: 150, y: 112, "text-anchor": "middle"}, "code where it fires"), h("text", {x: 295, y: 12, "text-anchor": "end"}, `tokens; tallest bar: ${number(top)}`));
    return h("div", {class: "chart"}, svg);
  }

  return {chart, bars, looks};
})();
