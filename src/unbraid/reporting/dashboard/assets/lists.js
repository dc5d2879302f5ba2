"use strict";
/* Lists of features: a selection of the feature table that was kept, and what can be saved as CSV or JSON. */
(() => {
  const {h, number, load, page, route, visible, labels} = unbraid;

  /* What is known about features given by address; those of no SAE shown here have only their address and labels. */
  async function described(addresses) {
    const run = unbraid.run(), byName = new Map(run.saes.map((sae, index) => [sae.name, index]));
    const split = addresses.map((address) => [address, address.slice(0, address.lastIndexOf("/")), Number(address.slice(address.lastIndexOf("/") + 1))]);
    const tables = new Map();
    for (const name of new Set(split.map(([, name]) => name))) if (byName.has(name)) tables.set(name, await load(`${byName.get(name)}/features`));
    return split.map(([address, name, feature]) => {
      const table = tables.get(name), there = table && feature < table.fires.length;
      const own = labels.of(address), index = byName.get(name);
      return {feature: address, label: own.label, note: own.note, fires: there ? table.fires[feature] : null, density: there ? table.fires[feature] / run.rows : null,
        largest: there ? table.largest[feature] : null, mean: there ? table.mean[feature] : null, top_correlation: there ? table.partner[feature] : null,
        decoder_cosine: there ? table.neighbour[feature] : null, fires_on: there ? table.peaks[feature] : "", raises: there ? table.raises[feature] : "",
        link: there ? `#/${index}/feature/${feature}` : null};
    });
  }

  /* A cell of a CSV file. A spreadsheet would run a text that begins like a formula, so it gets an apostrophe. */
  function cell(value) {
    if (value === null) return "";
    if (typeof value === "number") return String(value);
    const text = /^[=+\-@\t\r]/.test(value) ? `'${value}` : value;
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  }

  function offer(name, type, text) {
    const address = URL.createObjectURL(new Blob([text], {type})), link = h("a", {href: address, download: name});
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(address), 1000);
  }

  async function save(title, addresses, form) {
    const rows = (await described(addresses)).map(({link, ...row}) => row), name = title.replace(/[^\w.-]+/g, "-").replace(/^-+|-+$/g, "").slice(0, 80) || "features";
    if (form === "json") offer(`${name}.json`, "application/json", JSON.stringify({title, rows: unbraid.run().rows, features: rows}, null, 1));
    else {
      const columns = ["feature", "label", "note", "fires", "density", "largest", "mean", "top_correlation", "decoder_cosine", "fires_on", "raises"];
      offer(`${name}.csv`, "text/csv", [columns, ...rows.map((row) => columns.map((column) => row[column]))].map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n");
    }
  }
  const exports = (title, addresses) => [["CSV", "csv"], ["JSON", "json"]].map(([name, form]) =>
    h("button", {type: "button", onclick: () => save(title, addresses(), form)}, `Save as ${name}`));

  /* Below the feature table: save what is selected, as a file or as a list. */
  unbraid.selection = (title, addresses) => {
    const status = h("span", {class: "quiet", role: "note"}), name = h("input", {type: "text", maxlength: 100, placeholder: "name of a list", "aria-label": "name of a list"});
    const keep = labels.writable() ? [name, h("button", {type: "button", onclick: () => {
      const list = name.value.trim();
      if (list) labels.saveList(status, list, addresses());
    }}, "Keep these features as a list"), status] : [];
    return h("div", {class: "bar tools"}, exports(title, addresses), keep);
  };

  /* A link to a feature on the live page if that runs, else the command that starts it. */
  unbraid.tryIt = (address) => {
    const {live} = unbraid.run().commands;
    const line = live ? h("p", {class: "quiet"}, "To steer this feature, or see it on a prompt of your own, start ", h("code", {}, visible(live)), ` and choose ${address} there.`) : null;
    labels.livePage().then((url) => {
      if (url && line) line.replaceChildren("The live page is running: ", h("a", {href: `${url}&feature=${encodeURIComponent(address)}`, target: "_blank", rel: "noopener noreferrer"}, `steer ${address} there`), ".");
    });
    return line;
  };

  page(/^\/lists$/, "Lists", async () => {
    const lists = Object.entries(labels.lists()), labelled = Object.keys(unbraid.labels.all());
    return h("div", {}, h("h1", {}, "Lists of features"), labels.writable() ? h("p", {class: "quiet"}, "Features are added on their own pages, or all that a search finds below the feature table.") : labels.howTo(),
      h("div", {class: "scroll"}, h("table", {}, h("thead", {}, h("tr", {}, h("th", {scope: "col"}, "list"), h("th", {scope: "col"}, "features"))), h("tbody", {},
        [["every feature with a label or note", labelled, "#/list"], ...lists.map(([name, members]) => [name, members, `#/list/${encodeURIComponent(name)}`])].map(([name, members, href]) =>
          h("tr", {}, h("td", {}, h("a", {href, class: "note"}, visible(name))), h("td", {}, number(members.length))))))));
  });

  page(/^\/list(?:\/([^/]+))?$/, "Lists", async (match) => {
    const name = match[1] === undefined ? null : decodeURIComponent(match[1]), lists = labels.lists();
    if (name !== null && !Object.hasOwn(lists, name)) throw new Error("there is no such list");
    const members = name === null ? Object.keys(labels.all()) : lists[name], rows = await described(members), title = name === null ? "Features with a label or note" : name;
    const status = h("span", {class: "quiet", role: "status"});
    const drop = name !== null && labels.writable() ? [h("button", {type: "button", onclick: async () => {
      if (await labels.saveList(status, name, null) && route().path === match[0]) location.hash = "#/lists";
    }}, "Delete this list"), status] : [];
    return h("div", {}, h("p", {class: "steps"}, h("a", {href: "#/lists"}, "all lists")), h("h1", {class: "note"}, visible(title)),
      h("div", {class: "bar"}, exports(title, () => members), drop),
      h("div", {class: "scroll"}, h("table", {}, h("thead", {}, h("tr", {}, ["feature", "label", "density", "largest", "top corr.", "fires on"].map((text, at) => h("th", {scope: "col", class: at === 1 || at === 5 ? "text" : null}, text)))),
        h("tbody", {}, rows.map((row) => h("tr", {}, h("td", {}, row.link ? h("a", {href: row.link}, row.feature) : row.feature), h("td", {class: "text note"}, visible(row.label)),
          h("td", {}, number(row.density)), h("td", {}, number(row.largest)), h("td", {}, number(row.top_correlation)), h("td", {class: "text note", dir: "auto"}, visible(row.fires_on))))))));
  });
})();
