window.addEventListener("load", async () => {
  const wait = async (done) => { while (!done()) await new Promise((r) => setTimeout(r, 20)); };
  await wait(() => document.body.dataset.maps === "drawn");
  const all = (query) => [...document.querySelectorAll(query)];
  const get = (id) => document.getElementById(id);
  const seen = (element) => element.getClientRects().length > 0;
  const names = (table) => [...table.tBodies[0].rows].map((row) => row.cells[1].textContent);
  const click = (table, head) => all(`#${table} th button`).find((b) => b.textContent === head).click();
  const state = () => get("map-state").textContent;
  const pixels = (canvas) => canvas.toDataURL();
  const found = { figures: [] };
  for (const svg of all("svg.figure")) {
    const block = svg.closest(".block");
    if (block) {
      const pick = all("select.pick").find((p) => p.dataset.group === block.dataset.group);
      pick.value = block.dataset.subject;
      pick.dispatchEvent(new Event("change"));
    }
    const box = svg.getBoundingClientRect();
    if (box.width > 100 && box.height > 50) found.figures.push(svg.id);
  }
  found.blocks = all(".block[data-group=confusion]").filter(seen).length;
  const table = get("table-networks");
  click("table-networks", "parameters");
  found.ascending = names(table);
  click("table-networks", "parameters");
  found.descending = names(table);
  const gates = all("#map-images canvas")[1];
  const slider = get("map-threshold");
  found.own = [state(), Number(slider.value)];
  found.moved = [];
  for (const value of [slider.min, slider.max]) {
    slider.value = value;
    slider.dispatchEvent(new Event("input"));
    found.moved.push([state(), pixels(gates)]);
  }
  found.moved = found.moved.map(([text, drawn]) => [text, drawn === found.moved[0][1]]);
  get("map-own").click();
  found.back = state();
  all("#map-layers button")[1].click();
  found.second = state();
  const chip = all(".chip")[1];
  chip.click();
  const parts = all(".of-subject");
  found.hidden = [...new Set(parts.filter((p) => !seen(p)).map((p) => p.dataset.subject))];
  chip.click();
  found.widths = [document.documentElement.scrollWidth, innerWidth];
  found.ground = getComputedStyle(document.body).backgroundColor;
  const told = document.createElement("pre");
  told.id = "found";
  told.textContent = JSON.stringify(found);
  document.body.append(told);
});
