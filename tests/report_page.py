"""A dense, a factorised and an inertial network, a run, and the report of them."""

import html.parser
import json
import re

import jax
import numpy as np
from helpers import PREPROCESSING, SHAPE, save_bright_digits

import inertia_jax as ij
from inertia_jax.metadata import Metadata, checkpoint_path
from train.__main__ import main

PLAN = ij.Plan(
    (
        ("conv1", ij.Inertial(3, 4, reading="tiled", threshold=ij.Fixed(0.2))),
        ("conv2", ij.Inertial(3, 5, threshold=ij.Learned(0.3, per_channel=True))),
    )
)
EPOCHS = 3


def lenet(plan=ij.Plan()):  # noqa: B008, a plan cannot change
    model = ij.create_model("lenet", width=0.25, plan=plan)
    return model, ij.init_variables(model, jax.random.key(0), SHAPE)


def save_networks(folder):
    """Saves the networks, none of them trained, and returns their paths by name.

    `run` is the directory of a run of the inertial network, with the lines of a
    training that there never was.
    """
    source = save_bright_digits(folder / "digits.npz", 20, 30, SHAPE[0])
    config = {"name": "gated run", "seed": 7, "data": {"source": source}}
    paths = {name: folder / name for name in ("dense", "small", "run")}

    def save(path, network, **info):
        info = {"config": {"data": {"source": source}}, **info}
        names = tuple(f"class {i}" for i in range(10))
        metadata = Metadata(PREPROCESSING, names, info)
        ij.save_checkpoint(path, *network, metadata=metadata)

    dense = lenet()
    save(paths["dense"], dense)
    small = ij.compress(*dense, ranks=ij.Ratio(0.5), image_shape=SHAPE)
    options = {"checkpoint": str(paths["dense"]), "out": str(paths["small"])}
    compressed = {**options, "ranks": "ratio:0.5", "seed": 3, "weigh": False}
    save(paths["small"], small, compressed=compressed)
    run = paths["run"]
    save(checkpoint_path(run / "checkpoints", 6), lenet(PLAN), config=config)
    (run / "config.json").write_text(json.dumps(config))
    start = {"started": "now", "step": 0, "command": "python -m train fit --seed 7"}
    start |= {"cpu": "A <CPU> & more", "versions": {"jax": "9.9"}, "python": "3.x"}
    (run / "run.jsonl").write_text(json.dumps(start) + "\n")
    lines = []
    for epoch in range(1, EPOCHS + 1):
        line = {"step": 2 * epoch, "epoch": epoch, "loss": 1 / epoch}
        more = {"accuracy": 0.2 * epoch, "gate_rate": 0.5, "images_per_s": 9.0}
        lines.append({**line, "kind": "epoch", **more})
        rates = {"gate_rate/conv1": 0.25 * epoch, "gate_rate/conv2": 0.5}
        scores = {"top1": 0.1 * epoch, "top5": 1.0, **rates}
        lines.append({**line, "kind": "test", **scores})
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return paths


def report(folder, *options):
    """Saves the networks and reports them.

    Returns their paths, and the page, the Markdown and the record.
    """
    paths = save_networks(folder)
    out = folder / "out"
    assert (
        main(["report", *map(str, paths.values()), "--out", f"{out}/", *options]) == 0
    )
    files = [out / f"report.{suffix}" for suffix in ("html", "md", "json")]
    page, markdown, record = (file.read_text() for file in files)
    return paths, page, markdown, json.loads(record)


class Page(html.parser.HTMLParser):
    """The elements of a page: their attributes, and the text of each table's rows."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.rows, self.words = [], [], []
        self._open = []
        self.feed(text)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in ("meta", "input", "link", "br", "image"):
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag in ("option", "p", "li") and self._open[-1] != tag:
            return
        assert self._open.pop() == tag, tag

    def handle_data(self, data):
        self.words.append(data)
        if {"td", "th"} & {*self._open}:
            self.rows[-1][-1] += data.strip()

    def ids(self, tag=None):
        return [a["id"] for t, a in self.elements if "id" in a and tag in (None, t)]


def json_of(page, element):
    """Returns what an element of a page holds as JSON."""
    return json.loads(re.search(rf'id="{element}">(.*?)</script>', page)[1])


def predictions(network, source):
    """Returns the answers to the test images, worked out without the evaluator."""
    model, variables = network
    with np.load(source) as arrays:
        images, labels = arrays["x_test"], arrays["y_test"]
    batch = (images / 255 - PREPROCESSING.mean[0]) / PREPROCESSING.std[0]
    logits = jax.jit(model.apply)(variables, batch.astype(np.float32))
    return np.argmax(logits, -1), labels
