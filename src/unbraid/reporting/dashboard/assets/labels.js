"use strict";
/* A reader's own labels, notes and lists. A served dashboard keeps them in a file through its server, which wants the
secret of the printed address; one opened as a file shows those of the day it was written, and says how to change them. */
unbraid.labels = (() => {
  const {h, visible, load} = unbraid;
  let known = {features: {}, lists: {}}, secret = null;

  async function request(path, body) {
    const answer = await fetch(path, {
      method: body ? "POST" : "GET", cache: "no-store",
      headers: {"Authorization": `Bearer ${secret}`, ...(body ? {"Content-Type": "application/json"} : {})},
      body: body ? JSON.stringify(body) : undefined,
    });
    const found = await answer.json();
    if (!answer.ok) throw new Error(found.error || `the server answered ${answer.status}`);
    return found;
  }
  async function ask(body) { known = await request("api/labels", body); }

  /* The address of the live page of this run, while one runs. */
  async function livePage() {
    if (!secret) return null;
    const {url} = await request("api/live", null).catch(() => ({url: null}));
    return url && /^http:\/\/127\.0\.0\.1:\d+\/#k=[\w-]+$/.test(url) ? url : null;
  }

  /* Called once, before the first page. */
  async function open(given) {
    secret = given;
    try {
      if (secret) await ask(null); else known = await load("labels");
    } catch { secret = null; known = await load("labels").catch(() => known); }
  }

  const of = (address) => ({label: "", note: "", ...(Object.hasOwn(known.features, address) ? known.features[address] : {})});
  const lists = () => known.lists, all = () => known.features;

  /* Does `act` and says how it went. */
  async function kept(status, act) {
    status.textContent = "saving …";
    try { await act(); status.textContent = "saved"; return true; } catch (error) { status.textContent = `not saved: ${error.message}`; return false; }
  }
  const saveList = (status, list, members) => kept(status, () => ask({list, members}));

  function howTo() {
    const run = unbraid.run();
    return h("p", {class: "quiet"}, "To write labels, notes and lists, start ", h("code", {}, visible(run.commands.serve)), " and open the address it prints; they are kept in ",
      h("code", {}, visible(run.labels_file)), ".");
  }

  function editor(address) {
    const {label, note} = of(address);
    if (!secret) {
      return h("section", {class: "card labels"}, h("h2", {}, "Your label and note"), label ? h("strong", {class: "note"}, visible(label)) : null,
        note ? h("div", {class: "note"}, note) : null, howTo());
    }
    const status = h("span", {class: "quiet", role: "status"}), name = h("input", {type: "text", maxlength: 200, value: label}), text = h("textarea", {rows: 2, maxlength: 10000});
    text.value = note;
    const boxes = h("div", {class: "bar"});
    function drawLists() {
      const fresh = h("input", {type: "text", maxlength: 100, placeholder: "new list", "aria-label": "name of a new list"});
      boxes.replaceChildren("Lists:", ...Object.entries(known.lists).map(([list, members]) => {
        const box = h("input", {type: "checkbox", onchange: async () => {
          const rest = lists()[list].filter((one) => one !== address);
          await saveList(status, list, box.checked ? [...rest, address] : rest);
          drawLists();
        }});
        box.checked = members.includes(address);
        return h("label", {}, box, visible(list));
      }), fresh, h("button", {type: "button", onclick: async () => {
        const list = fresh.value.trim();
        if (list && await saveList(status, list, [...(Object.hasOwn(lists(), list) ? lists()[list].filter((one) => one !== address) : []), address])) drawLists();
      }}, "Add to list"));
    }
    const save = () => kept(status, () => ask({feature: address, label: name.value.trim(), note: text.value}));
    name.addEventListener("keydown", (event) => { if (event.key === "Enter") save(); });
    drawLists();
    return h("section", {class: "card labels"}, h("h2", {}, "Your label and note"), h("label", {}, "Label", name), h("label", {}, "Note", text),
      h("div", {class: "bar"}, h("button", {type: "button", onclick: save}, "Save"), status), boxes);
  }

  return {open, livePage, of, all, lists, saveList, editor, howTo, writable: () => secret !== null};
})();
