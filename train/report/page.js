"use strict";

/* Tables: a click on a head sorts by its column, another one turns the order round. */
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const body = table.tBodies[0];
    const value = (row) => row.cells[column].dataset.value;
    const compare = (a, b) => {
      if (a === "" || b === "") return (a === "") - (b === "");
      const [x, y] = [Number(a), Number(b)];
      const order = Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b) : x - y;
      return down ? -order : order;
    };
    body.append(...[...body.rows].sort((a, b) => compare(value(a), value(b))));
  }));
}

/* Legends: a click shows or hides a network in every figure; others fade meanwhile. */
const drawn = [...document.querySelectorAll(".of-subject")];
const chips = [...document.querySelectorAll(".chip")];
for (const chip of chips) {
  const subject = chip.dataset.subject;
  chip.addEventListener("click", () => {
    const off = chip.getAttribute("aria-pressed") === "true";
    chips.filter((other) => other.dataset.subject === subject)
      .forEach((other) => other.setAttribute("aria-pressed", String(!off)));
    drawn.filter((part) => part.dataset.subject === subject)
      .forEach((part) => part.classList.toggle("off", off));
  });
  for (const [event, dims] of [["mouseenter", true], ["mouseleave", false]]) {
    chip.addEventListener(event, () => drawn.forEach((part) =>
      part.classList.toggle("dim", dims && part.dataset.subject !== subject)));
  }
}

/* What is shown of one network at a time. */
for (const pick of document.querySelectorAll("select.pick")) {
  const blocks = document.querySelectorAll(`.block[data-group="${pick.dataset.group}"]`);
  const show = () => blocks.forEach((block) => { block.hidden = block.dataset.subject !== pick.value; });
  pick.addEventListener("change", show);
  show();
}

/* Maps of friction and gates. */
if (document.getElementById("map-data")) drawMaps(JSON.parse(document.getElementById("map-data").textContent));

function drawMaps(maps) {
  const get = (id) => document.getElementById(`map-${id}`);
  const [network, layer, slider, chosen] = ["network", "layer", "threshold", "image"].map(get);
  const stops = [[32, 17, 75], [123, 35, 130], [211, 67, 110], [251, 154, 106], [252, 253, 191]];
  for (const map of maps) {
    for (const one of map.layers) {
      one.level = Uint8Array.from(atob(one.levels), (letter) => letter.charCodeAt(0));
      one.shortest = one.path.replaceAll("/", "/\u200b");
    }
  }

  const percent = (share) => `${(100 * share).toFixed(1)}%`;
  const rate = (one, edge) => one.level.reduce((open, level) => open + (level > edge), 0) / one.level.length;
  const threshold = (one, edge) => edge < 0 ? "below all friction" : one.edges[edge] >= 1e29 ? "above all friction" : String(one.edges[edge]);

  function ramp(share) {
    const place = Math.min(share, 0.9999) * (stops.length - 1);
    const [low, high] = [stops[Math.floor(place)], stops[Math.floor(place) + 1]];
    const color = low.map((value, i) => Math.round(value + (place % 1) * (high[i] - value)));
    return `rgb(${color.join()})`;
  }

  /* Draws an image, and over each region the colour that `fill` has for its level.
     A line parts the regions that `isOpen` holds for from those that it does not. */
  function paint(canvas, picture, one, number, fill, isOpen) {
    const side = Math.ceil(192 / picture.width);
    canvas.width = picture.width * side;
    canvas.height = picture.height * side;
    const context = canvas.getContext("2d");
    context.imageSmoothingEnabled = false;
    context.drawImage(picture, 0, 0, canvas.width, canvas.height);
    const top = (row) => Math.round(row * canvas.height * one.covered[0] / one.rows);
    const left = (column) => Math.round(column * canvas.width * one.covered[1] / one.columns);
    const at = (row, column) => one.level[(number * one.rows + row) * one.columns + column];
    const rectangle = (color, x, y, width, height) => {
      context.fillStyle = color;
      context.fillRect(x, y, width, height);
    };
    for (let row = 0; row < one.rows; row++) {
      for (let column = 0; column < one.columns; column++) {
        const color = fill(at(row, column));
        if (color) rectangle(color, left(column), top(row), left(column + 1) - left(column), top(row + 1) - top(row));
      }
    }
    if (!isOpen) return;
    for (let row = 0; row < one.rows; row++) {
      for (let column = 0; column < one.columns; column++) {
        const open = isOpen(at(row, column));
        const [x, y] = [left(column), top(row)];
        if (column && open !== isOpen(at(row, column - 1))) rectangle(EDGE, x - 1, y - 1, 2, top(row + 1) - y + 2);
        if (row && open !== isOpen(at(row - 1, column))) rectangle(EDGE, x - 1, y - 1, left(column + 1) - x + 2, 2);
      }
    }
  }

  /* Neither black nor white, so that it is seen on both. */
  const [VEIL, EDGE] = ["rgba(98, 112, 138, 0.86)", "#f59f00"];
  function paintGates(canvas, picture, one, number, edge) {
    const isOpen = (level) => level > edge;
    paint(canvas, picture, one, number, (level) => isOpen(level) ? null : VEIL, isOpen);
  }

  const element = (name, parent, className) => {
    const made = document.createElement(name);
    if (className) made.className = className;
    parent.append(made);
    return made;
  };
  const current = () => ({ map: maps[network.value], one: maps[network.value].layers[layer.value] });

  function redraw() {
    const { map, one } = current();
    const edge = Number(slider.value);
    get("images").querySelectorAll("figure").forEach((figure, number) => {
      const picture = map.loaded[number];
      const [friction, gate] = figure.querySelectorAll("canvas");
      paint(friction, picture, one, number, (level) => {
        return ramp(level / one.edges.length).replace("rgb", "rgba").replace(")", ", 0.72)");
      });
      paintGates(gate, picture, one, number, edge);
    });
    const kind = one.thresholds > 1 ? `the median of ${one.thresholds} channels' own` : "its own";
    const own = `${kind}: ${threshold(one, one.own)}, ${percent(rate(one, one.own))}`;
    get("state").textContent = `${one.path}: threshold ${threshold(one, edge)}, ${percent(rate(one, edge))} of the gates open (${own})`;
  }

  function showLayer() {
    const { one } = current();
    slider.min = -1;
    slider.max = one.edges.length - 1;
    slider.value = one.own;
    get("layers").querySelectorAll("button").forEach((button, number) =>
      button.setAttribute("aria-pressed", String(number === Number(layer.value))));
    redraw();
  }

  function showStrip() {
    const { map } = current();
    get("layers").querySelectorAll("canvas").forEach((canvas, number) => {
      const one = map.layers[number];
      paintGates(canvas, map.loaded[chosen.value], one, Number(chosen.value), one.own);
    });
  }

  async function showNetwork() {
    const map = maps[network.value];
    if (!map.loaded) {
      map.loaded = await Promise.all(map.pictures.map(async (picture) => {
        const image = new Image();
        image.src = picture.image;
        await image.decode();
        return image;
      }));
    }
    layer.replaceChildren(...map.layers.map((one, number) => new Option(one.path, number)));
    chosen.replaceChildren(...map.pictures.map((picture, number) => new Option(picture.label, number)));
    get("images").replaceChildren();
    for (const picture of map.pictures) {
      const figure = element("figure", get("images"));
      const pair = element("div", figure);
      for (const what of ["friction", "gates"]) {
        const canvas = element("canvas", pair);
        canvas.setAttribute("role", "img");
        canvas.setAttribute("aria-label", `${what} on an image of ${picture.label}`);
      }
      const words = element("figcaption", figure);
      words.textContent = picture.label === picture.answer ? `${picture.label}, recognised` : `${picture.label}, taken for ${picture.answer}`;
      words.classList.toggle("wrong", picture.label !== picture.answer);
    }
    get("layers").replaceChildren();
    map.layers.forEach((one, number) => {
      const button = element("button", get("layers"));
      button.type = "button";
      element("canvas", button);
      element("span", button).textContent = `${one.shortest} ${percent(rate(one, one.own))}`;
      button.addEventListener("click", () => { layer.value = number; showLayer(); });
    });
    showLayer();
    showStrip();
    document.body.dataset.maps = "drawn";
  }

  network.addEventListener("change", showNetwork);
  layer.addEventListener("change", showLayer);
  chosen.addEventListener("change", showStrip);
  slider.addEventListener("input", redraw);
  get("own").addEventListener("click", () => { slider.value = current().one.own; redraw(); });
  showNetwork();
}
